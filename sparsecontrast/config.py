"""Configuration: Hydra at the edge, frozen dataclasses (``settings.py``) inside.

``compose`` is the only place that meets Hydra. Everything else takes those dataclasses, or plain
arguments. An unknown key or an impossible value is a ``ConfigError`` that names it.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecontrast.errors import ConfigError
from sparsecontrast.ranges import check_ranges
from sparsecontrast.relations import check_relations
from sparsecontrast.settings import Config, Housed, MethodConfig, MiramConfig
from sparsecontrast.structure import build

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
OWN_COMMANDS = {
    "sparse_attn_net": "classifies labelled cells; run `sparsecontrast classify train`, or a federation with "
    "experiment=cells; `sparsecontrast classify evaluate` judges both",
    "a2a": "trains on one acquisition as it denoises it; run sparsecontrast denoise FILE.npz --out DIR",
}


def compose(overrides: Sequence[str] | str = ()) -> Config:
    """Compose ``configs/`` with Hydra overrides into a checked ``Config``.

    Args:
        overrides: ``["data.root=/x", "method=dense_contrast"]``, or one string of them separated by
            white space or newlines (Flower's run config carries one string).

    Raises:
        ConfigError: an unknown group, key or value, with the nearest known names.
    """
    words = split_overrides(overrides) if isinstance(overrides, str) else list(overrides)
    return compose_tree(hydra_tree(words), words)


def compose_tree(tree: Mapping[str, Any], words: Sequence[str]) -> Config:
    """Check what ``hydra_tree`` made of the overrides ``words``, as ``compose`` does.

    Raises:
        ConfigError: as there.
    """
    foreign = {"sweep"}  # of many runs, not of one
    if not any(word.lstrip("+~").partition("=")[0].split(".")[0] == "cells" for word in words):
        foreign.add("cells")  # of another kind of run; what was asked of it is refused as unknown
    tree = {key: value for key, value in tree.items() if key not in foreign}
    name = tree["method"].get("name")
    if name in OWN_COMMANDS:  # they have other keys, which would only be called unknown
        raise ConfigError(f"method={name}: {OWN_COMMANDS[name]}")
    tree["method"] = _own_keys(tree["method"], words)
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


def site_state_dir(config: Housed, site: str) -> Path:
    """Return the folder of a site's durable state."""
    if config.site.state_dir is not None:
        return anchored(config.site.state_dir)
    return anchored(config.output_dir) / "sites" / site


def shared_state_dir(config: Housed) -> Path:
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


def _own_keys(method: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Leave out what an experiment sets of the contrasts where the method is another kind.

    An experiment sizes the method that it was written for, such as its projection head, and works with all.
    What the user's own words set stays, and is refused as unknown.
    """
    if method.get("name") != "miram":
        return method
    foreign = {f.name for f in dataclasses.fields(MethodConfig)}
    foreign -= {f.name for f in dataclasses.fields(MiramConfig)}
    asked = {word.lstrip("+~").partition("=")[0].removeprefix("method.") for word in words}
    return {key: value for key, value in method.items() if key not in foreign - asked}


def _choices() -> str:
    groups = sorted(p.name for p in CONFIG_DIR.iterdir() if p.is_dir())
    known = (f"{g}={'|'.join(sorted(p.stem for p in (CONFIG_DIR / g).glob('*.yaml')))}" for g in groups)
    return "Known groups: " + "; ".join(known) + ". Any key of configs/ can be set as key=value."
