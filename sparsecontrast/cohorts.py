"""Whom a charge burdens: the patients, whatever run, folder or list they come in.

The rule, and why. A step's output can depend on patient p only if p was in the cohort from which it
sampled, so p's epsilon is that of all steps of all cohorts that held p, composed (and under add/remove of
one patient nothing else counts: for p, the other cohorts are the same data set twice). A cohort's epsilon is
that of its worst patient. Hence

- the same patients in another order, run, folder or under another run's name: the same account;
- a grown cohort: its old patients bring their history along, and the worst of them decides for all;
- a shrunk one: who stays keeps all that was charged to the larger cohort;
- a patient who comes back finds the old charges; one who is new begins at zero, beside others who do not;
- cohorts without a common patient do not burden each other (parallel composition).

Nothing is averaged over patients and nobody's past is forgotten. What it cannot see: one patient under two
hospital numbers is two patients, and so is one whose pseudonym was made with another key; hence the ledger
keeps a check of the key and refuses another.
"""

import functools
import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparsecontrast.accounting import Charge, merged
from sparsecontrast.errors import EmptySiteError

DIGEST = 16  # bytes a patient: 128 bits of HMAC-SHA256, no two alike among all patients of the world
MAX_HISTORIES = 16  # compared one by one; of more, their joint upper bound


@dataclass(frozen=True)
class Cohort:
    """The patients from whom a run samples.

    Attributes:
        digests: one keyed digest a patient, distinct, sorted; no pseudonym is kept.
        key_check: tells the key of the digests from another, and nothing else of it.
    """

    digests: tuple[bytes, ...]
    key_check: str

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the patients, 64 hexadecimal digits."""
        return fingerprint(b"".join(self.digests))


def cohort_of(patients: Iterable[object], key: bytes) -> Cohort:
    """Digest the patients from whom a site trains; repetitions and order do not matter.

    Args:
        patients: pseudonyms as the site's index has them, one an image or one a patient.
        key: of the site's pseudonyms.

    Raises:
        EmptySiteError: nobody.
    """
    digests = {_keyed(key, f"ledger:{patient}")[:DIGEST] for patient in set(patients)}
    if not digests:
        raise EmptySiteError("a cohort without a patient cannot be trained on")
    return Cohort(tuple(sorted(digests)), _keyed(key, "ledger key check").hex()[:32])


def fingerprint(members: bytes) -> str:
    """Hash sorted digests, joined."""
    return hashlib.sha256(members).hexdigest()


@functools.lru_cache(maxsize=8)
def split(members: bytes) -> frozenset[bytes]:
    """Take joined digests apart."""
    return frozenset(members[i : i + DIGEST] for i in range(0, len(members), DIGEST))


def overlapping(digests: Iterable[bytes], known: Mapping[str, frozenset[bytes]]) -> list[str]:
    """Name the known cohorts with a common patient."""
    digests = frozenset(digests)
    return [name for name, members in known.items() if not members.isdisjoint(digests)]


def worst_histories(
    digests: Iterable[bytes], known: Mapping[str, frozenset[bytes]], charges: Sequence[tuple[str, Charge]]
) -> list[tuple[Charge, ...]]:
    """Return what the most burdened of these patients have spent.

    Args:
        digests: the patients.
        known: every cohort ever charged, by fingerprint.
        charges: (fingerprint, charge), oldest first.

    Returns:
        Histories of which none contains another, at least one; every patient's is contained in one.
        Beyond ``MAX_HISTORIES`` a single one that contains all.
    """
    seen = {merged(charge for name, charge in charges if name in names) for names in _alike(digests, known)}
    counts = {history: {(c.noise_multiplier, c.sample_rate): c.steps for c in history} for history in seen}
    worst: list[tuple[Charge, ...]] = []
    # by falling number of steps: who is contained in another comes after it
    for history in sorted(seen, key=lambda h: (-sum(c.steps for c in h), str(h))):
        if not any(_contains(counts[other], counts[history]) for other in worst):
            worst.append(history)
    if len(worst) <= MAX_HISTORIES:
        return worst
    kinds = {kind: max(c.get(kind, 0) for c in counts.values()) for kind in _kinds(worst)}
    return [tuple(Charge(*kind, steps) for kind, steps in kinds.items())]


def _alike(digests: Iterable[bytes], known: Mapping[str, frozenset[bytes]]) -> list[frozenset[str]]:
    """Name the cohorts of each kind of patient: two are alike who were in the same ones."""
    groups = {frozenset[str](): frozenset(digests)}
    for name, members in known.items():
        inside = {names | {name}: group & members for names, group in groups.items()}
        outside = {names: group - members for names, group in groups.items()}
        groups = {names: group for names, group in (inside | outside).items() if group}
    return list(groups)


def _kinds(histories: Iterable[tuple[Charge, ...]]) -> list[tuple[float, float]]:
    return sorted({(c.noise_multiplier, c.sample_rate) for history in histories for c in history})


def _contains(larger: Mapping[tuple[float, float], int], smaller: Mapping[tuple[float, float], int]) -> bool:
    return all(larger.get(kind, 0) >= steps for kind, steps in smaller.items())


def _keyed(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()
