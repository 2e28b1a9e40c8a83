"""Self-supervised methods on a hospital's images, as a federation trains them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecontrast.config import anchored, check, compose, shared_state_dir
from sparsecontrast.errors import ConfigError, EmptySiteError, TooFewImagesError
from sparsecontrast.federated import Learner, Place
from sparsecontrast.overrides import key_of, without
from sparsecontrast.settings import Config

if TYPE_CHECKING:
    import pandas as pd

    from sparsecontrast.data.dataset import Dataset

# A worker serves many sites and rounds of one run: what they share is made once, one entry each.
_datasets: dict[str, "Dataset"] = {}
_names: dict[str, list[str]] = {}


def at_site(heard: Config, told: Sequence[str]) -> Config:
    """Put the site's data, privacy and, where its file says so, backbone in place.

    Args:
        heard: what the server's words gave.
        told: overrides of the site's file.

    Raises:
        ConfigError: parts that are in order by themselves do not fit each other.
    """
    own = own_images(told)
    pinned = any(key_of(word).split(".")[0] == "backbone" for word in told)
    # by whatever spelling of an override it came
    asked = dataclasses.replace(heard.backbone, pretrained=False)
    config = dataclasses.replace(
        heard,
        backbone=own.backbone if pinned else asked,
        # the size is the model's need, everything else about the data is the site's
        data=dataclasses.replace(own.data, image_size=heard.data.image_size),
        privacy=own.privacy,
    )
    check(config)
    return config


def own_images(told: Sequence[str]) -> Config:
    """Compose what a site's file says, less its pictures of cells, which are of another kind of run.

    Raises:
        ConfigError: an unknown key or value.
    """
    return compose(without(told, ["cells"]))


def refuse_uncut(config: Config) -> None:
    """Refuse a run whose sites are not cut yet, or whose coins are not tossed.

    Raises:
        ConfigError: says how to do it.
    """
    if config.data.index is not None:
        return
    how = "Run `python -m simulation.partition OVERRIDES --out FILE`, then add data.index=FILE"
    if config.federation.partition != "by_site":
        raise ConfigError(
            f"federation.partition={config.federation.partition}: the sites must be cut before they start. "
            f"{how}"
        )
    if config.audit.canaries > 0:
        raise ConfigError(
            f"audit.canaries={config.audit.canaries}: the coins are tossed before the sites start, in a "
            f"simulation alone. {how}"
        )


def site_names(config: Config) -> list[str]:
    """Names of the sites in the data, sorted.

    Raises:
        ConfigError: the sites are not cut as configured.
    """
    from sparsecontrast.data.cache import load_rows

    if config.federation.partition != "by_site" and config.data.index is None:
        raise ConfigError(
            f"federation.partition={config.federation.partition} without data.index: run "
            "`python -m simulation.partition OVERRIDES --out FILE`, then add data.index=FILE"
        )
    state_dir = shared_state_dir(config)
    key = repr((config.data, config.federation.partition, str(state_dir)))
    if key not in _names:
        frame, _ = load_rows(config.data, state_dir, progress=False)
        _check_cut(frame, config.federation.partition)
        _names.clear()
        _names[key] = sorted(set(frame["site"].astype(str)))
    return _names[key]


def build(config: Config, pretrained: bool = True) -> Any:
    """Build the configured method; see ``methods.build_method``."""
    from sparsecontrast.methods import build_method

    return build_method(config, pretrained)


def learner(module: Any, config: Config, place: Place) -> Learner:
    """Load the site's training images, and build its trainer, private where the site says so.

    Raises:
        DataError: see ``training_set``.
        MethodError: private, and the method couples images.
        PrivacyError: the site's budget does not allow it.
    """
    from sparsecontrast.trainers import build_trainer

    own = training_set(config, place)
    patients = own.frame["patient_id"]
    trainer = build_trainer(
        module, config, place.name, place.state_dir, place.run_key, patients, place.key_dir
    )
    return Learner(trainer, own.images, own.patient_codes)


def training_set(config: Config, place: Place) -> "Dataset":
    """Return the site's training images and what is known of them.

    Nothing outside the ``train`` split is ever touched here, nor a canary who drew tails, nor, where the unit
    of privacy is the patient, an image that names none.

    Raises:
        EmptySiteError: no readable training image.
        TooFewImagesError: fewer than ``data.min_images``.
        ConfigError: ``audit.canaries``, but no coin was tossed.
    """
    dataset = _dataset(config, place.key_dir)
    own = dataset.site(place.name) if place.simulated else dataset
    train = own.training(config.audit.canaries)
    if config.privacy.name != "none" and (left := len(train) - len(train.named())):
        train = train.named()
        place.say(f"{left} image(s) that name no patient are left out of private training")
    least = config.data.min_images
    if len(train) == 0:
        raise EmptySiteError(f"site {place.name}: no readable training image; see quarantine.csv")
    if len(train) < least:
        raise TooFewImagesError(f"site {place.name}: {len(train)} training images, data.min_images={least}")
    return train


def _check_cut(frame: "pd.DataFrame", partition: str) -> None:
    """Refuse an index that is not cut as configured: its sites would not be the ones reported."""
    from sparsecontrast.data.sites import is_cut, refuse_leaks

    if not is_cut(frame, partition):
        raise ConfigError(
            f"federation.partition={partition}: data.index is not cut so; run "
            "`python -m simulation.partition OVERRIDES --out FILE`, then give data.index=FILE"
        )
    refuse_leaks(frame)


def _dataset(config: Config, state_dir: Path) -> "Dataset":
    """Load a site's data, or take them from memory."""
    from sparsecontrast.data.cache import load_dataset

    cache_dir = (
        anchored(config.data.cache_dir) if config.data.cache_dir else Path(config.output_dir) / "cache"
    )
    key = repr((config.data, str(cache_dir), str(state_dir)))
    if key not in _datasets:
        _datasets.clear()
        _datasets[key] = load_dataset(config, cache_dir, state_dir, progress=False)
    return _datasets[key]
