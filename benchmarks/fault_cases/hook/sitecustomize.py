"""kill -9 at a named place of a program that knows nothing of it; Python imports this file before any other.

``FAULTS_PLAN`` names a JSON file: in which process (words of its command line or environment), at which
function, entered or left the how-manieth time, counted from which other one on, who dies. The plan is done
once, and then renamed to ``*.done``, and ``*.killed`` lists who died; where nobody is to die, the process
stands there until ``*.done`` is deleted. A client process that is forked (``client/executor.py``) looks for
the plan when it comes to be.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

ANY = 0  # a call: the first that finds the plan


class Patch(importlib.abc.MetaPathFinder):
    """Puts the fault into a module as soon as it has been imported.

    Args:
        told: the plan.
        path: of its file.
    """

    def __init__(self, told: dict[str, Any], path: str):
        self.told, self.path, self.calls = told, path, 0
        self.armed = not told["after"]
        self.places = {told["module"]: (told["function"], self.around)}
        if told["after"]:
            module, _, function = told["after"].partition(":")
            self.places[module] = (function, self.arming)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Find the module as ever, and change what it holds when it is there."""
        if name not in self.places:
            return None
        function, around = self.places.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            put(module, function, around)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def put_now(self) -> None:
        """Change what has been imported already."""
        for name in [name for name in self.places if name in sys.modules]:
            put(sys.modules[name], *self.places.pop(name))

    def arming(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Count from the first call of this function on."""

        def changed(*args: Any, **named: Any) -> Any:
            self.armed = True
            return real(*args, **named)

        return changed

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Call the real function, and kill before or behind it, or with its file half written."""

        def changed(*args: Any, **named: Any) -> Any:
            self.calls += self.armed
            now = self.armed and self.told["call"] in (self.calls, ANY)
            if now and self.told["when"] == "enter":
                self.kill()
            if now and self.told["when"] == "half":
                before = half(real, *args, **named)
                self.kill()
                args[0].truncate(before)  # another process died: this one goes on as if nothing were
            result = real(*args, **named)
            if now and self.told["when"] == "leave":
                self.kill()
            return result

        return changed

    def kill(self) -> None:
        """Kill, or wait, once; who loses the race to the plan goes on."""
        try:
            with open(self.path, encoding="utf-8") as file:
                if json.load(file) != self.told:
                    return  # a later plan, for another process
            os.rename(self.path, self.path + ".done")
        except (OSError, ValueError):
            return
        if self.told["victim"] == "nobody":
            while os.path.exists(self.path + ".done"):
                time.sleep(0.02)
            return
        victims = [os.getpid()] if self.told["victim"] == "itself" else found(self.told["victim"])
        with open(self.path + ".part", "w", encoding="utf-8") as file:
            json.dump(victims, file)
        os.rename(self.path + ".part", self.path + ".killed")
        for pid in victims:
            os.kill(pid, signal.SIGKILL)


def put(module: Any, function: str, around: Callable[..., Any]) -> None:
    """Replace a function, or ``Class.method``, of a module."""
    *above, last = function.split(".")
    owner = getattr(module, above[0]) if above else module
    setattr(owner, last, around(getattr(owner, last)))


def half(write: Callable[..., Any], file: Any, *rest: Any, **named: Any) -> int:
    """Let ``write`` put all but the last ten bytes into ``file``; returns its former size."""
    file.seek(0, os.SEEK_END)
    before = file.tell()
    write(file, *rest, **named)
    file.truncate(before + max((file.seek(0, os.SEEK_END) - before) - 10, 1))
    os.fsync(file.fileno())
    return before


def found(words: list[str]) -> list[int]:
    """Processes whose command line and environment hold all of these words."""
    pids = []
    for name in os.listdir("/proc"):
        if name.isdigit() and matches(name, words):
            pids.append(int(name))
    return pids


def matches(pid: str, words: list[str]) -> bool:
    """Whether the command line and the environment of a process hold all of these words."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as command, open(f"/proc/{pid}/environ", "rb") as environment:
            told = command.read() + b"\n" + environment.read()
    except OSError:
        return False
    return all(word.encode() in told for word in words)


def install() -> None:
    """Put the plan's fault in place, if this is the process that it is for."""
    path = os.environ.get("FAULTS_PLAN", "")
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except (OSError, ValueError):
        return
    if matches("self", told["process"]):
        patch = Patch(told, path)
        sys.meta_path.insert(0, patch)
        patch.put_now()


def forked() -> None:
    """Put it in place in a client process, not in the one that it is forked from."""
    if "client.sentinel" in sys.modules:
        install()


if matches("self", ["client.executor"]):
    os.register_at_fork(after_in_child=forked)
else:
    install()
