"""What a site promises its patients: a policy, agreed once, that no later run can loosen."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from sparsecontrast.errors import ConfigError, PolicyError
from sparsecontrast.settings import PrivacyConfig


@dataclass(frozen=True)
class Policy:
    """The promise to every patient of a cohort.

    Attributes:
        target_epsilon: what no patient's epsilon may exceed, all runs together.
        delta: of that epsilon; None until it is chosen for a cohort.
        max_grad_norm: C, the L2 norm to which a patient's gradient is clipped.
        images_per_patient: at most so many in a step.
        unit: whom neighbours differ by.
    """

    target_epsilon: float
    delta: float | None
    max_grad_norm: float
    images_per_patient: int
    unit: Literal["patient"] = "patient"

    def settled(self, patients: int, agreed: "list[Policy]") -> "Policy":
        """Return the policy with its delta for a cohort, or refuse it.

        Args:
            patients: of the cohort.
            agreed: policies of the cohorts that share a patient with it; a null delta becomes theirs.

        Raises:
            PolicyError: another policy was agreed with some of the patients, or delta is not below
                1 / patients.
        """
        delta = self.delta or next((p.delta for p in agreed), None) or default_delta(patients)
        policy = dataclasses.replace(self, delta=delta)
        for other in agreed:
            if found := policy.differences(other):
                raise PolicyError(
                    f"another policy was agreed with some of these patients: {'; '.join(found)}. It cannot "
                    "change: every promise holds for all that is ever computed. Set the values back"
                )
        if delta * patients >= 1:
            raise PolicyError(
                f"privacy.delta={delta:g}: must be below 1 / patients = 1 / {patients}, or publishing a "
                "whole patient would pass for private; set it to null, or lower"
                + (" (agreed for a smaller cohort: train on at most so many patients)" if agreed else "")
            )
        return policy

    def differences(self, agreed: "Policy") -> list[str]:
        """Name each value that is not as agreed."""
        before, now = dataclasses.asdict(agreed), dataclasses.asdict(self)
        return [f"{key} was {before[key]}, is {now[key]}" for key in now if now[key] != before[key]]


def policy_of(config: PrivacyConfig) -> Policy:
    """Read the policy from a checked configuration.

    Raises:
        ConfigError: it is not one of a private site.
    """
    told: dict[str, Any] = {f.name: getattr(config, f.name, "patient") for f in dataclasses.fields(Policy)}
    missing = [f"privacy.{key}" for key, value in told.items() if value is None and key != "delta"]
    if config.name == "none" or missing:
        raise ConfigError(f"privacy={config.name}: no policy, {', '.join(missing)} missing")
    return Policy(**told)


def default_delta(patients: int) -> float:
    """Return the largest power of ten that is at most 1 / (10 x patients).

    At least ten times below the bound, so a cohort may grow tenfold under the delta it began with.
    """
    exponent = math.ceil(math.log10(10 * patients) - 1e-12)
    return float(f"1e-{exponent}")
