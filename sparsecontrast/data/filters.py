"""Which images belong: frontal views of a chest. What is not known is kept, never guessed away."""

import re
from typing import Protocol

_LATERAL = {
    "LATERAL", "LAT", "L", "R", "LL", "RL", "LLAT", "RLAT", "LLO", "XTABLE", "SWIMMERS", "OBLIQUE",
    "LAO", "RAO", "LPO", "RPO",
}  # fmt: skip
_OTHER = {"LLD", "RLD", "DECUBITUS", "AXIAL", "LORDOTIC", "MLO", "CC", "COSTAL", "EXCLUDE"}
_UNKNOWN = {"", "?", "UNK", "UNKNOWN", "FRONTAL", "NONE", "NAN"}
_CHEST = re.compile(r"CHEST|THORA|TORAX|LUNG|PULM|\bCXR\b")
_SPINE = re.compile(r"SPINE|COLUMN|VERTEBR")
_ELSEWHERE = re.compile(
    r"SPINE|COLUMN|VERTEBR|HIP\b|KNEE|HAND|FOOT|ANKLE|WRIST|ELBOW|SHOULDER|PELVI|ABD|SKULL|HEAD|NECK|BREAST|"
    r"MAMMO|FEMUR|TIBIA|HUMERUS|FOREARM|FINGER|TOE\b|SINUS|TEETH|JAW|EXTREMIT|WHOLE ?BODY"
)
RADIOGRAPHS = ("", "CR", "DX", "RG")


class Described(Protocol):
    """Anything that says what part of whom it shows; a ``Header`` does."""

    @property
    def modality(self) -> str:
        """DICOM modality, or ""."""
        ...

    @property
    def body_part(self) -> str:
        """BodyPartExamined, or ""."""
        ...

    @property
    def description(self) -> str:
        """Series and study description, or ""."""
        ...


def normal_view(text: str) -> str:
    """Bring the many spellings of a view to PA, AP, LATERAL, OTHER, or "" where it is not known.

    Supine, erect and horizontal AP are AP. Decubitus, lordotic and axial views are OTHER, though
    the beam runs front to back: the lungs look nothing like in a frontal view. Oblique is LATERAL.
    """
    words = [w for w in re.split(r"[^A-Z?]+", text.upper()) if w]
    joined = " ".join(words)
    if joined in _UNKNOWN:
        return ""
    if _OTHER.intersection(words):
        return "OTHER"
    if words[0] in ("PA", "AP"):
        return words[0]
    if re.search(r"POSTERO ?ANTERIOR", joined):
        return "PA"
    if re.search(r"ANTERO ?POSTERIOR", joined):
        return "AP"
    return "LATERAL" if _LATERAL.intersection(words) else "OTHER"


def is_frontal(view: str) -> bool:
    """Keep PA, AP and the unknown: whole archives name no view, and would be lost for it."""
    return view in ("PA", "AP", "")


def is_chest(header: Described) -> bool:
    """Keep plain radiographs of the chest, and those of which no tag says otherwise.

    The body part decides where it is given; where not, the series and study description; a header
    that is silent is kept. A thoracic spine is no chest.
    """
    if header.modality.upper() not in RADIOGRAPHS:
        return False
    if part := header.body_part.upper():
        return bool(_CHEST.search(part)) and not _SPINE.search(part)
    said = header.description.upper()
    return bool(_CHEST.search(said) and not _SPINE.search(said)) or not _ELSEWHERE.search(said)
