"""Every error a user can cause, and the code that may travel in its place.

    SparseContrastError                 internal
    ├── ConfigError                     config          unknown override, impossible value
    ├── DataError                       data
    │   ├── MissingDataError            data_missing    folder or index that is not there
    │   ├── RecipeError                 data_recipe     a recipe that does not fit its table
    │   ├── IndexSchemaError            data_schema     an index without the agreed columns
    │   ├── ImageReadError              image_unreadable  one file; quarantined, never fatal
    │   ├── EmptySiteError              site_empty      no usable image at a site
    │   ├── TooFewImagesError           site_too_small  fewer images than the method needs
    │   └── PatientLeakError            patient_leak    one patient in two splits or two sites
    ├── ModelError                      model
    │   ├── BackboneMismatchError       backbone_mismatch  weights of another architecture
    │   └── ExportError                 export          an exported model that is not the run's
    ├── MethodError                     method          a loss that cannot be computed as asked
    ├── PrivacyError                    privacy         what was asked for would not be private
    │   ├── BudgetSpentError            budget_spent    a round that would exceed a patient's epsilon
    │   ├── PolicyError                 privacy_policy  another epsilon, delta or norm than agreed
    │   ├── LedgerError                 ledger          a ledger that is torn, missing, old or a copy
    │   └── EgressError                 egress          what would leave may not, or its log is broken
    │       └── HeldError               held            a release that nobody at the site approved
    ├── PayloadError                    payload_*       what arrived may not be aggregated
    ├── LimitError                      limit           the site's own limits, see client/sentinel.py
    │   ├── OvertimeError               overtime        an answer that took longer than the site allows
    │   ├── OutOfMemoryError            out_of_memory   more memory than there is, or than the site allows
    │   ├── AppRefusedError             app_refused     an app that the site does not run
    │   └── OverrideRefusedError        override_refused  a server's override that does more than set a value
    ├── StorageError                    storage         full disk, read-only folder
    │   └── CheckpointError             checkpoint      torn, foreign or missing round file
    ├── FederationError                 federation
    │   └── QuorumError                 quorum          too few valid replies in a round
    └── EvaluationError                 evaluation
        ├── UntrainedError              untrained       nothing was trained, nothing to score
        └── LabelError                  label           a label absent or constant where needed

The message of an error (what was wrong, where, what to do) stays on the machine where it arose:
it may hold paths. Only ``code`` travels.
"""


class SparseContrastError(Exception):
    """Root of the tree; ``code`` is a short constant that is safe to send to a server."""

    code = "internal"


class ConfigError(SparseContrastError):
    """An unknown override, or a value outside its range."""

    code = "config"


class DataError(SparseContrastError):
    """The data of a site cannot be used as asked."""

    code = "data"


class MissingDataError(DataError):
    """A folder, index or image that was named does not exist."""

    code = "data_missing"


class RecipeError(DataError):
    """A recipe names columns, labels or files that its table does not have."""

    code = "data_recipe"


class IndexSchemaError(DataError):
    """An index file lacks agreed columns or holds values of the wrong kind."""

    code = "data_schema"


class ImageReadError(DataError):
    """One image file cannot be decoded; callers quarantine it and go on."""

    code = "image_unreadable"


class EmptySiteError(DataError):
    """A site has no usable image."""

    code = "site_empty"


class TooFewImagesError(DataError):
    """A site has fewer images than the method needs for one step."""

    code = "site_too_small"


class PatientLeakError(DataError):
    """A patient stands in two splits, or at two sites."""

    code = "patient_leak"


class ModelError(SparseContrastError):
    """A model cannot be built as asked."""

    code = "model"


class BackboneMismatchError(ModelError):
    """Weights do not fit the backbone that the config names."""

    code = "backbone_mismatch"


class ExportError(ModelError):
    """An exported model does not compute what the run computes, or cannot be exported as asked."""

    code = "export"


class MethodError(SparseContrastError):
    """A method cannot compute its loss on what it was given."""

    code = "method"


class PrivacyError(SparseContrastError):
    """What was asked for would not be as private as it says."""

    code = "privacy"


class BudgetSpentError(PrivacyError):
    """A round would exceed the epsilon of the patients whom it would see; nothing was charged."""

    code = "budget_spent"


class PolicyError(PrivacyError):
    """A privacy policy is impossible for its cohort, or not the one agreed for its patients."""

    code = "privacy_policy"


class LedgerError(PrivacyError):
    """The ledger cannot be trusted: torn, missing, rolled back, edited, or a copy of another."""

    code = "ledger"


class EgressError(PrivacyError):
    """What would leave a site is not what may, or the log of what left cannot be trusted."""

    code = "egress"


class HeldError(EgressError):
    """A release that a person at the site has not approved, in time or at all."""

    code = "held"


REASONS = (
    "names", "shape", "dtype", "size", "nonfinite", "norm", "update_norm", "manifest", "weight", "stale",
)  # fmt: skip


class PayloadError(SparseContrastError):
    """A payload may not leave, or may not be aggregated.

    Args:
        reason: one of ``REASONS``; becomes the end of ``code``.
        message: what was wrong, without values of the arrays.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
        self.code = f"payload_{reason}"


class LimitError(SparseContrastError):
    """A site's own limits do not allow it."""

    code = "limit"


class OvertimeError(LimitError):
    """An answer took longer than the site allows."""

    code = "overtime"


class OutOfMemoryError(LimitError):
    """An answer needs more memory than there is, or than the site allows."""

    code = "out_of_memory"


class AppRefusedError(LimitError):
    """The server's app is none that this site runs."""

    code = "app_refused"


class OverrideRefusedError(LimitError):
    """An override in a server's message would look something up at the site."""

    code = "override_refused"


class StorageError(SparseContrastError):
    """A file could not be written whole; the previous one is still there."""

    code = "storage"


class CheckpointError(StorageError):
    """A round file is torn, missing or belongs to another run."""

    code = "checkpoint"


class FederationError(SparseContrastError):
    """The federation cannot go on."""

    code = "federation"


class QuorumError(FederationError):
    """Fewer valid replies than ``federation.min_sites`` in one round."""

    code = "quorum"


class EvaluationError(SparseContrastError):
    """A score that would mean nothing was asked for."""

    code = "evaluation"


class UntrainedError(EvaluationError):
    """The weights to score were never trained."""

    code = "untrained"


class LabelError(EvaluationError):
    """A label is absent or constant where both classes are needed."""

    code = "label"


def _codes(root: type[SparseContrastError]) -> set[str]:
    return {root.code}.union(*(_codes(child) for child in root.__subclasses__()))


CODES = frozenset(_codes(SparseContrastError) | {f"payload_{reason}" for reason in REASONS})
"""All that may travel: what is derived from these errors elsewhere adds none."""


def code_of(error: Exception) -> str:
    """Name what went wrong in a word that may travel, one of ``CODES``."""
    if isinstance(error, SparseContrastError):
        return error.code if error.code in CODES else SparseContrastError.code
    # torch's allocators raise RuntimeErrors of their own
    full = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
    )
    return OutOfMemoryError.code if full else SparseContrastError.code
