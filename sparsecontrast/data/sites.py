"""Sites of an index: one site a patient, and the smallest sites merged."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsecontrast.errors import ConfigError, PatientLeakError

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 64


def safe_name(site: str) -> str:
    """Make a site's name fit for a folder and a table: anything but letters, digits, . + - becomes _."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", site.strip()).strip("._") or "site"


def one_site_a_patient(patients: Sequence[str], sites: Sequence[str]) -> tuple[list[str], int]:
    """Bring all images of a patient to the site with most of them, by name among equals.

    A patient at two sites would sit on both sides of every comparison between them.

    Returns:
        One site an image, and how many images changed theirs.
    """
    counts: dict[str, dict[str, int]] = {}
    for patient, site in zip(patients, sites, strict=True):
        at = counts.setdefault(patient, {})
        at[site] = at.get(site, 0) + 1
    home = {patient: min(at, key=lambda site: (-at[site], site)) for patient, at in counts.items()}
    settled = [home[patient] for patient in patients]
    return settled, sum(new != old for new, old in zip(settled, sites, strict=True))


def merge_sites(frame: "pd.DataFrame", to: int) -> "pd.DataFrame":
    """Merge sites until ``to`` remain: each time the two with the fewest images, by name among equals.

    The merged site is named by its parts in alphabetical order, joined by "+"; where that grows
    longer than 64 characters, by the first part and the number of others. Nothing but the counts of
    images decides, so the same data always gives the same sites.

    Args:
        frame: an index; only its ``site`` column is read.
        to: how many sites are to remain; more than there are changes nothing.

    Returns:
        A copy with new sites; where any changed, the old ones stay as ``source_site``.

    Raises:
        ConfigError: ``to`` below 1.
    """
    if to < 1:
        raise ConfigError(f"data.merge_sites_to={to}: must be at least 1")
    counts = frame["site"].value_counts()
    sizes: dict[tuple[str, ...], int] = {(str(site),): int(n) for site, n in counts.items()}
    while len(sizes) > to:
        first, second = sorted(sizes, key=lambda parts: (sizes[parts], parts))[:2]
        merged = tuple(sorted(first + second))
        sizes[merged] = sizes.pop(first) + sizes.pop(second)
    names = {part: _joined(parts) for parts in sizes for part in parts}
    merged = frame["site"].map(names)
    if merged.equals(frame["site"]) or "source_site" in frame:
        return frame.assign(site=merged)
    return frame.assign(site=merged, source_site=frame["site"])


def refuse_leaks(frame: "pd.DataFrame") -> None:
    """Refuse a patient at two sites, unless the cut was made so and says it in a column ``overlap``.

    Raises:
        PatientLeakError: says how many.
    """
    torn = int((frame.groupby("patient_id")["site"].nunique() > 1).sum())
    if torn and "overlap" not in frame:
        raise PatientLeakError(
            f"{torn} patients lie at two sites: give each patient one site, or ask for it with "
            "python -m simulation.partition --overlap"
        )


def is_cut(frame: "pd.DataFrame", partition: str) -> bool:
    """Whether an index has been cut by ``federation.partition``; its column ``partition`` tells.

    Raises:
        ConfigError: it was cut in another way.
    """
    if partition == "by_site" or "partition" not in frame:
        return partition == "by_site"
    if (was := set(frame["partition"])) != {partition}:
        raise ConfigError(
            f"federation.partition={partition}, but data.index was cut by "
            f"{', '.join(sorted(map(str, was)))}: leave one of them out"
        )
    return True


def _joined(parts: tuple[str, ...]) -> str:
    whole = "+".join(parts)
    return whole if len(whole) <= LONGEST else f"{parts[0]}+{len(parts) - 1}_others"
