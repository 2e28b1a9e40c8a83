"""One command, many runs: a grid of configurations, cell by cell.

``plan(words)`` multiplies out every override that is a sweep in Hydra's grammar (``a=1,2``, ``choice``,
``range``) and the grid that an experiment brings along::

    sweep:
      axes:
        seed: 0,1,2                       # a key, swept in Hydra's grammar
        epsilon:                          # or an axis of named points, each with its overrides
          8: [privacy=dp_sgd, privacy.target_epsilon=8]
          inf: [privacy=none]
        start:
          random: []
          phantoms: [init=<phantoms>]     # <NAME>: the folder of a run made before; <folder>: the cell's own
      before:
        phantoms: {axes: [seed], overrides: [data=phantom, data.phantom.seed=1]}

A word whose key is an axis chooses among its points (``epsilon=8``, ``epsilon=8,inf``); any other word is
of every run and wins over a point's. A run of ``before`` is made once for each choice on its axes; its
overrides win over all, so that it stays what its name says.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecontrast.config import alternatives, raw_tree
from sparsecontrast.errors import ConfigError
from sparsecontrast.overrides import assign, key_of, merge

SEED = "seed"
FOLDER = "folder"  # what a cell calls its own, in angle brackets
_MENTION = re.compile(r"<(\w+)>")
Points = dict[str, list[str]]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: its folder below the sweep's.
        folder: as an override may say it: relative where ``output_dir`` is.
        words: its overrides, ``output_dir`` among them.
        values: the chosen point of each axis.
        pretraining: whether it is one of ``before``: one trainer, no federation, no scores.
    """

    name: str
    folder: str
    words: tuple[str, ...]
    values: Mapping[str, str]
    pretraining: bool = False

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """What it shares with the runs of the other seeds."""
        return tuple((axis, value) for axis, value in self.values.items() if axis != SEED)


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep: ``before`` must be done when ``cells`` begin; ``folder`` holds all."""

    folder: str
    before: tuple[Job, ...]
    cells: tuple[Job, ...]


def plan(words: Sequence[str]) -> Plan:
    """Multiply out a sweep; the last axis varies fastest.

    Raises:
        ConfigError: an unknown point, a sweep that cannot be listed, a grid that is not in order.
    """
    experiment = [w for w in words if key_of(w) == "experiment"]
    if any(alternatives(w) is not None for w in experiment):
        raise ConfigError(f"{experiment[0]}: one experiment at a time brings its grid")
    tree = raw_tree(experiment).get("sweep") or {}
    _check(tree)
    axes = {str(name): _points(str(name), told) for name, told in (tree.get("axes") or {}).items()}
    common = _chosen(words, axes, {str(n) for n, told in (tree.get("axes") or {}).items() if _named(told)})
    home = str(raw_tree(common)["output_dir"])
    if not any(key_of(word) == "data.cache_dir" for word in common):
        common = [*common, assign("data.cache_dir", f"{home}/cache")]
    before: dict[str, Job] = {}
    cells = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        told = [word for axis, value in chosen.items() for word in axes[axis][value]]
        folder = f"{home}/{_name(chosen)}"
        own = merge(merge(_merged(told), common), [assign("output_dir", folder)])
        places = {FOLDER: folder}
        for name in sorted({found for word in own for found in _MENTION.findall(word)} - {FOLDER}):
            job = _before(name, tree, chosen, axes, common, home)
            before[job.name], places[name] = job, job.folder
        cells.append(Job(_name(chosen), folder, tuple(_placed(w, places) for w in own), chosen))
    if len({cell.name for cell in cells}) < len(cells):
        raise ConfigError("sweep: two runs would share a folder; let their points have other names")
    return Plan(home, tuple(before.values()), tuple(cells))


def _named(told: Any) -> bool:
    return isinstance(told, Mapping)


def _points(axis: str, told: Any) -> Points:
    if _named(told):
        return {str(name): [str(word) for word in words or ()] for name, words in told.items()}
    return _swept(f"{axis}={told}")


def _swept(word: str) -> Points:
    """The points of one word, by their values."""
    return {one.partition("=")[2]: [one] for one in alternatives(word) or [word]}


def _chosen(words: Iterable[str], axes: dict[str, Points], named: set[str]) -> list[str]:
    """Let words choose points and bring axes of their own, in place; returns those that are of every run."""
    common = []
    for word in words:
        key = key_of(word)
        if key in named:
            points = list(_swept(word))
            if strange := sorted(set(points) - set(axes[key])):
                raise ConfigError(
                    f"{word}: the axis {key} has no point {strange[0]}; it has {list(axes[key])}"
                )
            axes[key] = {point: axes[key][point] for point in points}
        elif key in axes or alternatives(word) is not None:
            axes[key] = _swept(word)
        else:
            common.append(word)
    return common


def _before(
    name: str, tree: Mapping[str, Any], chosen: Mapping[str, str], axes: Mapping[str, Points],
    common: Sequence[str], home: str,
) -> Job:  # fmt: skip
    known = tree.get("before") or {}
    if name not in known:
        raise ConfigError(f"sweep: <{name}> is neither <{FOLDER}> nor a run of sweep.before: {sorted(known)}")
    told = known[name]
    values = {axis: chosen[axis] for axis in told.get("axes") or () if axis in chosen}
    words = [word for axis, value in values.items() for word in axes[axis][value]]
    folder = "/".join(part for part in (home, name, _name(values)) if part)
    words = merge(merge(_merged(words), common), [str(word) for word in told.get("overrides") or ()])
    words = [_placed(word, {FOLDER: folder}) for word in words]
    words = merge(words, [assign("output_dir", folder)])
    return Job(folder.removeprefix(f"{home}/"), folder, tuple(words), values, pretraining=True)


def _merged(words: Sequence[str]) -> list[str]:
    """Keep the last word on each key."""
    return list({key_of(word): word for word in words}.values())


def _placed(word: str, places: Mapping[str, str]) -> str:
    """Put folders where a word mentions them."""
    key, _, value = word.partition("=")
    found = _MENTION.sub(lambda match: places.get(match[1], match[0]), value)
    return word if found == value else assign(key, found)


def _name(values: Mapping[str, str]) -> str:
    """Name a folder by what was chosen: ``epsilon_8-start_random/seed_0``."""
    parts = [f"{_safe(axis)}_{_safe(value)}" for axis, value in values.items() if axis != SEED]
    seed = [f"{SEED}_{_safe(values[SEED])}"] if SEED in values else []
    return "/".join([*(["-".join(parts)] if parts else []), *seed])


def _safe(text: str) -> str:
    """Make a value fit for a folder; one that had to change bears a mark, so that no two are alike."""
    plain = re.sub(r"[^A-Za-z0-9.+]+", "_", text).strip("._")
    if plain == text or (plain == text.replace("-", "_") and "_" not in text):
        return plain
    return f"{plain[:40]}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _check(tree: Any) -> None:
    """Hold a grid to its form."""
    if not isinstance(tree, Mapping) or set(tree) - {"axes", "before"}:
        raise ConfigError("sweep: has the keys axes and before")
    for name, told in (tree.get("axes") or {}).items():
        lists = told.values() if _named(told) else ()
        if not (_named(told) or isinstance(told, str | int | float)) or any(
            words is not None and not isinstance(words, list) for words in lists
        ):
            raise ConfigError(
                f"sweep.axes.{name}: is values such as 0,1,2, or points, each a list of overrides"
            )
    for name, told in (tree.get("before") or {}).items():
        if not isinstance(told, Mapping) or set(told) - {"axes", "overrides"} or name == FOLDER:
            raise ConfigError(f"sweep.before.{name}: has the keys axes and overrides")
