"""Can what must last be trusted: the privacy ledger, the log of all that left."""

from collections.abc import Iterator
from pathlib import Path

from sparsecontrast.doctor.finding import Finding
from sparsecontrast.errors import ConfigError, EgressError, LedgerError, StorageError
from sparsecontrast.settings import Config


def ledger(config: Config, state_dir: Path) -> Iterator[Finding]:
    """Prove the ledger whole, and see whether a round is left in it."""
    from sparsecontrast.budget import any_spent, statement
    from sparsecontrast.ledger import HEAD, Ledger, ledger_of

    private = config.privacy.name != "none"
    try:
        own = ledger_of(config, state_dir) if private else Ledger(state_dir)
        if not own.path.exists() and not (own.path.parent / HEAD).exists():
            what = (
                "none yet, the first private round makes it" if private else "none: no private training here"
            )
            yield Finding("ok", "ledger", what)
            return
        head = own.verify()
        told = statement(own)
    except (LedgerError, StorageError, ConfigError) as error:
        remedy = "restore the newest whole one; until then no private round is possible"
        yield Finding("FAIL", "ledger", str(error).split(";")[0], remedy)
        return
    spent = max((cohort["epsilon"] for cohort in told["cohorts"]), default=0.0)
    what = f"whole, {head.count} rows, epsilon {spent:.3f} spent"
    if any_spent([told]):
        yield Finding(
            "warn", "ledger", f"{what}: no further round fits", "this site will say so, and sit out"
        )
    else:
        yield Finding("ok", "ledger", what)


def egress(state_dir: Path, manual: bool) -> Iterator[Finding]:
    """Prove the log whole, and see whether something waits for a person."""
    from sparsecontrast.approval import waiting
    from sparsecontrast.egress import EgressLog

    log = EgressLog(state_dir)
    if not log.begun():
        yield Finding("ok", "egress", "nothing has left yet")
    else:
        try:
            last = log.verify()
        except (EgressError, OSError) as error:
            remedy = "restore it as it last was; until then nothing leaves"
            yield Finding("FAIL", "egress", str(error).split(";")[0], remedy)
            return
        yield Finding("ok", "egress", f"whole, {last.number} answers have left")
    if waits := len(waiting(state_dir)):
        yield Finding(
            "warn", "approval", f"{waits} wait for a person", "sparsecontrast egress list STATE_DIR"
        )
    elif manual:
        yield Finding("ok", "approval", "a person approves each release; nothing waits")
