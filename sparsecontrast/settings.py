"""What a run is told: one frozen dataclass for each group of ``configs/``.

``config.compose`` fills and checks them; everything else takes these, or plain arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


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
    """A method that contrasts and chooses where to look; ``configs/method/*.yaml`` explains every field."""

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
class MiramConfig:
    """The method that reconstructs; ``configs/method/miram.yaml`` explains every field."""

    name: Literal["miram"]
    cell: int
    mask_ratio: float
    upsample: Literal[1, 2, 4]
    high_weight: float
    normalise: bool
    attention: Literal["softmax", "linformer", "performer", "nystromformer"]
    landmarks: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    high_share: float = 1.0  # of runs that are older than the key


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
    update_norm: str | float
    partition: Literal["by_site", "dirichlet", "quantity", "iid", "scanner"]
    alpha: float
    workers: int


@dataclass(frozen=True)
class SiteConfig:
    """What a site owns: its name and where its durable state lies."""

    name: str | None
    state_dir: str | None


class Housed(Protocol):
    """What says where a run's files lie, whatever it trains."""

    @property
    def output_dir(self) -> str:
        """The run folder."""
        ...

    @property
    def site(self) -> SiteConfig:
        """What a site owns."""
        ...


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

    method: MethodConfig | MiramConfig
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
