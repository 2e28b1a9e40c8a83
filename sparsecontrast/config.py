"""Configuration: Hydra at the edge, frozen dataclasses inside.

``compose`` is the only place that meets Hydra. Everything else takes these dataclasses, or plain
arguments. An unknown key or an impossible value is a ``ConfigError`` that names it.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsecontrast.errors import ConfigError
from sparsecontrast.ranges import check_ranges
from sparsecontrast.relations import check_relations
from sparsecontrast.structure import build

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
OWN_COMMANDS = {
    "sparse_attn_net": "classifies labelled cells; run `sparsecontrast classify train`",
    "a2a": "trains on one acquisition as it denoises it; run sparsecontrast denoise FILE.npz --out DIR",
}


@dataclass(frozen=True)
class BackboneConfig:
    """A timm ViT (``patch_size``, ``pool``, ``depth`` None for the model's own) or CNN (``tiles``, ``halo``).

    ``name`` is as timm spells it. A key of the other kind stays at its default, or is refused.
    """

    name: str
    img_size: int
    pretrained: bool | str
    patch_size: int | None = None
    depth: int | None = None
    pool: Literal["token", "avg"] | None = None
    tiles: int | None = None
    halo: int | None = None


@dataclass(frozen=True)
class MethodConfig:
    """A pretraining method; ``configs/method/*.yaml`` explains every field."""

    name: Literal["sparse_contrast", "dense_contrast", "patch_contrast"]
    selection: Literal["surprise", "attention", "random", "centre", "energy"]
    keep: float
    cell: int
    explore: float
    focus: bool
    surprise_weight: float
    centre_prior: float
    temperature: float
    projection_dim: int
    projection_hidden: int
    momentum: float
    distill_weight: float
    distill_every: int
    distill_fraction: float
    entropy_floor: float
    entropy_weight: float
    sparsity_weight: float
    same_patient: bool
    dense_start: float
    dense_end: float


@dataclass(frozen=True)
class PhantomConfig:
    """How many procedural radiographs; patients per hospital, images per patient at most."""

    sites: int = 10
    patients_per_site: int = 40
    images_per_patient: int = 2
    seed: int = 0


@dataclass(frozen=True)
class DataConfig:
    """Where images come from. ``recipe`` is read by ``sparsecontrast.data.index``."""

    name: str
    kind: Literal["phantom", "csv", "dicom"]
    root: str | None
    index: str | None
    image_size: int
    cache_dir: str | None
    frontal_only: bool
    chest_only: bool
    val_fraction: float
    test_fraction: float
    salt: str
    merge_sites_to: int | None
    min_images: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of a site, each patient's; ``configs/privacy/dp_sgd.yaml`` explains every field.

    Under ``none`` all others are None. ``delta``, ``noise_multiplier``, ``public_patients`` and
    ``insecure_seed`` may be so under ``dp_sgd`` too: chosen by the number of patients, by the planned
    rounds, that number rounded, and no seed.
    """

    name: Literal["none", "dp_sgd"]
    target_epsilon: float | None = None
    delta: float | None = None
    max_grad_norm: float | None = None
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    planned_rounds: int | None = None
    steps_per_round: int | None = None
    images_per_patient: int | None = None
    public_patients: int | None = None
    insecure_seed: int | None = None


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, participation, strategy and limits; see ``configs/federation/fedavg.yaml``."""

    rounds: int
    sites: int
    fraction: float
    strategy: str
    options: Mapping[str, Any]
    proximal_mu: float
    min_sites: int
    round_timeout: float
    connect_timeout: float
    payload_dtype: Literal["fp32", "fp16"]
    upload: Literal["weights", "delta", "delta_int8"]
    weighting: Literal["examples", "uniform"]
    max_weight: float
    max_norm_ratio: float
    partition: Literal["by_site", "dirichlet", "quantity", "iid", "scanner"]
    alpha: float
    workers: int


@dataclass(frozen=True)
class SiteConfig:
    """What a site owns: its name and where its durable state lies."""

    name: str | None
    state_dir: str | None


@dataclass(frozen=True)
class TrainConfig:
    """One site's local loop; ``warmup_rounds`` is a fraction of all rounds."""

    batch_size: int
    local_epochs: int
    lr: float
    weight_decay: float
    warmup_rounds: float
    crop_area: tuple[float, ...]
    rotation: float
    precision: Literal["fp32", "bf16"]
    compile: bool
    threads: int
    steps: int | None = None


@dataclass(frozen=True)
class AutoKeepConfig:
    """What ``evaluation.keep=auto`` promises; ``sparsecontrast.auto_keep`` keeps it."""

    confidence: float
    tolerance: float


@dataclass(frozen=True)
class EvaluationConfig:
    """Probes of a run; ``tasks`` entries are read by ``sparsecontrast.evaluation``."""

    keep: str | float
    auto: AutoKeepConfig
    precision: Literal["fp32", "bf16", "int8"]
    label_fractions: tuple[float, ...]
    bootstrap: int
    knn_neighbours: int
    tasks: tuple[Mapping[str, Any], ...]
    baselines: tuple[str, ...]
    overlays: int


@dataclass(frozen=True)
class AuditConfig:
    """Who is held out by chance, and how membership is scored; ``sparsecontrast.membership`` does it."""

    canaries: float
    views: int
    delta: float | None = None


@dataclass(frozen=True)
class Config:
    """One run, whole. ``overrides`` is what the user said, for the record and for the sites."""

    method: MethodConfig
    backbone: BackboneConfig
    data: DataConfig
    privacy: PrivacyConfig
    federation: FederationConfig
    site: SiteConfig
    train: TrainConfig
    audit: AuditConfig
    evaluation: EvaluationConfig
    seed: int
    selection: str
    output_dir: str
    resume: str | None
    init: str | None
    tensorboard: bool
    experiment: str | None = None
    overrides: tuple[str, ...] = ()


def compose(overrides: Sequence[str] | str = ()) -> Config:
    """Compose ``configs/`` with Hydra overrides into a checked ``Config``.

    Args:
        overrides: ``["data.root=/x", "method=dense_contrast"]``, or one string of them separated by
            white space or newlines (Flower's run config carries one string).

    Raises:
        ConfigError: an unknown group, key or value, with the nearest known names.
    """
    words = split_overrides(overrides) if isinstance(overrides, str) else list(overrides)
    tree = {
        key: value for key, value in hydra_tree(words).items() if key != "sweep"
    }  # of many runs, not of one
    name = tree["method"].get("name")
    if name in OWN_COMMANDS:  # they have other keys, which would only be called unknown
        raise ConfigError(f"method={name}: {OWN_COMMANDS[name]}")
    config = build(Config, {**tree, "overrides": tuple(words)}, "")
    check(config)
    return config


def raw_tree(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose without checking or resolving anything; ``sparsecontrast.sweeps`` reads the grid in it.

    Raises:
        ConfigError: an unknown group or key.
    """
    return hydra_tree(list(overrides), resolve=False)


def alternatives(word: str) -> list[str] | None:
    """List the overrides that a sweep in Hydra's grammar stands for; None where the word is none.

    Raises:
        ConfigError: not in Hydra's grammar, or a sweep without an end (``interval``, ``glob``).
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{word}: not an override, or a sweep without an end ({reason})") from error
    return None if values is None else [f"{override.get_key_element()}={value}" for value in values]


def compose_method(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose the keys of a method that has its own loop, such as ``a2a``, without its name.

    Raises:
        ConfigError: an unknown group or key.
    """
    tree = hydra_tree([f"method={name}", *overrides])["method"]
    return {key: value for key, value in tree.items() if key != "name"}


def check(config: Config) -> None:
    """Refuse values that are well-typed but impossible, by themselves or beside each other.

    Raises:
        ConfigError: the first one found, with what it may be.
    """
    check_ranges(config)
    check_relations(config)


def split_overrides(text: str) -> list[str]:
    """Split one string into overrides at white space outside brackets and quotes."""
    words, word, depth, quote = [], "", 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "[{(") - (char in "]})")
        if char.isspace() and not quote and depth == 0:
            words, word = [*words, word], ""
        else:
            word += char
    return [w for w in [*words, word] if w]


def anchored(path: str | Path) -> Path:
    """Make a path absolute: relative ones start at ``$SPARSECONTRAST_HOME``, else here."""
    return (Path(os.environ.get("SPARSECONTRAST_HOME") or Path.cwd()) / Path(path).expanduser()).resolve()


def site_state_dir(config: Config, site: str) -> Path:
    """Return the folder of a site's durable state."""
    if config.site.state_dir is not None:
        return anchored(config.site.state_dir)
    return anchored(config.output_dir) / "sites" / site


def shared_state_dir(config: Config) -> Path:
    """Return the folder of what all sites on one machine share: their key of pseudonyms, the built index.

    With ``site.state_dir`` it outlives the run, as a privacy budget must: another key would make every
    patient a new one.
    """
    if config.site.state_dir is not None:
        return anchored(config.site.state_dir)
    return anchored(config.output_dir) / "state"


def as_dict(config: Any) -> dict[str, Any]:
    """Turn a config dataclass into plain dicts and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: as_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {k: as_dict(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [as_dict(v) for v in config]  # type: ignore[return-value]
    return config


def hydra_tree(words: list[str], root: str = "config", resolve: bool = True) -> dict[str, Any]:
    """Compose ``configs/<root>.yaml`` with overrides into plain values, unchecked.

    Raises:
        ConfigError: an unknown group or key.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            tree = hydra_compose(root, overrides=words, return_hydra_config=False)
        found = OmegaConf.to_container(tree, resolve=resolve, throw_on_missing=resolve)
        return typing.cast(dict[str, Any], found)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # a number longer than Python reads
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"overrides {words}: {reason}. {_choices()}") from error


def _choices() -> str:
    groups = sorted(p.name for p in CONFIG_DIR.iterdir() if p.is_dir())
    known = (f"{g}={'|'.join(sorted(p.stem for p in (CONFIG_DIR / g).glob('*.yaml')))}" for g in groups)
    return "Known groups: " + "; ".join(known) + ". Any key of configs/ can be set as key=value."
