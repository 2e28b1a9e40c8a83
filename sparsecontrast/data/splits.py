"""Patient-disjoint splits that do not move when data is added.

The split of a patient depends on the salt and on the patient's own id alone, so a new study of a
known patient, or a thousand new patients, never push anyone from train to test.
"""

import hashlib
from collections.abc import Sequence

from sparsecontrast.errors import ConfigError, PatientLeakError, RecipeError

SPLITS = ("train", "val", "test")


def assign_splits(
    patient_ids: Sequence[str], salt: str, val_fraction: float, test_fraction: float
) -> list[str]:
    """Give each id its split: ``test``, ``val`` or ``train``; equal ids get equal splits.

    sha256(salt + ":" + id) is read as a number u in [0, 1): u < test_fraction is test,
    u < test_fraction + val_fraction is val, the rest is train.

    Args:
        patient_ids: one id an image, repeats allowed. The index passes ids as the site knows them, before
            pseudonyms: these depend on a random key, splits must not.
        salt: any text; another salt is another, independent split.
        val_fraction: expected share of patients in val, in [0, 1).
        test_fraction: expected share of patients in test, in [0, 1).

    Returns:
        One split an id, in the order given.

    Raises:
        ConfigError: fractions that are negative or leave nothing to train on.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction}: must not be negative, "
            "and their sum must be below 1"
        )

    def split(patient_id: str) -> str:
        draw = unit_hash(salt, patient_id)
        if draw < test_fraction:
            return "test"
        return "val" if draw < test_fraction + val_fraction else "train"

    known = {patient_id: split(patient_id) for patient_id in set(patient_ids)}
    return [known[patient_id] for patient_id in patient_ids]


def published_splits(
    patient_ids: Sequence[str], published: Sequence[str], salt: str, val_fraction: float, test_fraction: float
) -> list[str]:
    """Follow the split a data set was published with, and the hash where it says nothing.

    ``trainval`` is divided into train and val by the hash, ``""`` takes the split of the patient's
    other images or, where there is none, the hash over all three.

    Raises:
        RecipeError: a published split of another name.
        PatientLeakError: a patient published in two splits.
    """
    if strange := sorted(set(published) - {*SPLITS, "trainval", ""}):
        raise RecipeError(f"recipe.split: {strange[:3]} are none of {SPLITS}, trainval or empty")
    said: dict[str, str] = {}
    torn = set()
    for patient, split in zip(patient_ids, published, strict=True):
        if split and said.setdefault(patient, split) != split:
            torn.add(patient)
    if torn:
        raise PatientLeakError(
            f"{len(torn)} patients stand in two splits of the published division: "
            "correct the table, or set data.recipe.split=null to split by patient"
        )
    hashed = assign_splits(patient_ids, salt, val_fraction, test_fraction)
    inner = assign_splits(patient_ids, salt, val_fraction / (1 - test_fraction), 0.0)
    return [
        {"": by_hash, "trainval": by_inner}.get(said.get(patient, ""), said.get(patient, ""))
        for patient, by_hash, by_inner in zip(patient_ids, hashed, inner, strict=True)
    ]


def unit_hash(salt: str, patient_id: str) -> float:
    """Return sha256(salt + ":" + id) as a number in [0, 1), from its first 52 bits (exact in a float)."""
    digest = hashlib.sha256(f"{salt}:{patient_id}".encode(errors="surrogateescape")).digest()
    return (int.from_bytes(digest[:7], "big") >> 4) / 2**52
