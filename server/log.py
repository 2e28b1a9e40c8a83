"""Lines for people, through Flower's logger: they reach the console and ``flwr log`` alike."""

from logging import ERROR, INFO, WARNING

from flwr.common.logger import log


def say(line: str) -> None:
    """Report progress."""
    log(INFO, "%s", line)


def warn(line: str) -> None:
    """Report something that went wrong without ending the run."""
    log(WARNING, "%s", line)


def fail(line: str) -> None:
    """Report why the run ends."""
    log(ERROR, "%s", line)
