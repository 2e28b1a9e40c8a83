"""One line of the doctor: ``ok|warn|FAIL  name  what  -> what to do``."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from sparsecontrast.errors import SparseContrastError


@dataclass(frozen=True)
class Finding:
    """What one check found. No path of an image, no identifier and no value of a tag stands in it.

    Attributes:
        level: ``FAIL`` where a run would not work, or not be safe.
        name: of the check.
        what: was found.
        remedy: what to do; "" where all is well.
    """

    level: Literal["ok", "warn", "FAIL"]
    name: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.level:<4}  {self.name:<10}  {self.what}"
        return f"{text}  -> {self.remedy}" if self.remedy else text


Check = Callable[[], Iterable[Finding]]


def guarded(name: str, check: Check) -> list[Finding]:
    """Run a check; one that fails itself is a finding, told by the error's kind, not by its text.

    The text of an error may name a file, and files may be named after patients.
    """
    try:
        return list(check())
    except SparseContrastError as error:
        return [Finding("FAIL", name, f"error {error.code}", "see what the commands of this part say")]
    except Exception as error:  # noqa: BLE001  the other checks are to be heard
        return [Finding("FAIL", name, f"the check ended with {type(error).__name__}", "report it")]
