"""Choose a site's trainer: private where the configuration says so, plain where it says ``none``."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecontrast.settings import Config
from sparsecontrast.trainer import LocalTrainer

if TYPE_CHECKING:
    from sparsecontrast.private_trainer import PrivateTrainer


def build_trainer(
    method: Any, config: Config, site: str, state_dir: Path, run: str, patients: Iterable[object],
    key_dir: Path,
) -> "LocalTrainer | PrivateTrainer":  # fmt: skip
    """Return the trainer of one site in one run.

    Args:
        method: holds the global weights.
        config: of the run, privacy that of the site.
        site: its name.
        state_dir: where its ledger lies.
        run: key of the run.
        patients: pseudonyms of all training images.
        key_dir: where the key of the pseudonyms lies.

    Raises:
        MethodError: private, and the method couples images.
        PrivacyError: see ``account.open_account``.
    """
    if config.privacy.name == "none":
        return LocalTrainer(method, config, site)
    from sparsecontrast.account import open_account  # Opacus takes seconds to import
    from sparsecontrast.data.pseudonyms import load_key
    from sparsecontrast.private_trainer import PrivateTrainer

    account = open_account(config, state_dir, run, patients, load_key(key_dir))
    return PrivateTrainer(method, config, site, account)
