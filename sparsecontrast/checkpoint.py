"""Rounds on disk: whole or not there.

A round is up to three files, written in this order, each to a temporary name, flushed to the disk
and renamed:

    round_0007.safetensors            global weights, fp32
    round_0007.strategy.safetensors   the strategy's own state (moments, momentum), if it has any
    round_0007.json                   what happened, and the sha256 of the two others

The JSON comes last, so a round without it never happened, and a round whose hashes do not fit (a
write of the same number stopped halfway) is torn: ``latest`` skips it. ``parent`` in the JSON is the
hash of the weights of the round before.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import CheckpointError

ROUNDS = "rounds"
SEAL = "sha256"  # key of a file's metadata
_META = re.compile(r"round_(\d{4,})\.json")


@dataclass(frozen=True)
class Round:
    """One whole round.

    Attributes:
        number: 0 is the state before any training.
        tensors: global weights by name, fp32.
        strategy: the aggregation strategy's tensors by name; empty for stateless ones.
        meta: the JSON beside them.
    """

    number: int
    tensors: dict[str, Tensor]
    strategy: dict[str, Tensor]
    meta: dict[str, Any]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, atomically; returns the sha256 of the file.

    The bytes depend on names and values alone, so equal tensors make equal files. The file's own metadata
    vouch for all else in it: one bit that flips on the disk is found when it is read.

    Raises:
        StorageError: as in ``write_bytes``.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    blank = "0" * 64  # what vouches takes its place: a second serialisation costs more than all the rest
    data = bytearray(safetensors.torch.save(whole, metadata={SEAL: blank}))
    at = data.index(f'"{SEAL}":"{blank}"'.encode(), 8) + len(SEAL) + 4
    data[at : at + 64] = _seal(data)[0].encode()
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; one that vouches for itself is held to it.

    Raises:
        CheckpointError: missing, torn or changed.
    """
    return _parse(path, _read(path))


def round_file(run_dir: Path, number: int, suffix: str = ".safetensors") -> Path:
    """Name a file of a round: ``<run_dir>/rounds/round_0007.safetensors``."""
    return run_dir / ROUNDS / f"round_{number:04d}{suffix}"


def write_round(
    run_dir: Path,
    number: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    strategy: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a whole round; returns its JSON.

    Args:
        run_dir: the run folder.
        number: the round, 0 for the initial weights.
        tensors: global weights.
        meta: JSON-able facts of the round; ``round`` and ``files`` are added.
        strategy: the strategy's tensors.

    Raises:
        StorageError: nothing of this round counts; rounds before it are intact.
    """
    files = {}
    for suffix, group in ((".safetensors", tensors), (".strategy.safetensors", strategy)):
        if group:
            path = round_file(run_dir, number, suffix)
            files[path.name] = write_tensors(path, group)
    whole = {"round": number, **meta, "files": files}
    text = json.dumps(whole, indent=1, sort_keys=True, allow_nan=False)
    write_bytes(round_file(run_dir, number, ".json"), text.encode())
    return whole


def read_round(run_dir: Path, number: int) -> Round:
    """Read a round and check its hashes.

    Raises:
        CheckpointError: missing, torn or changed; says which file.
    """
    meta = read_meta(run_dir, number)
    groups: dict[str, dict[str, Tensor]] = {}
    for suffix in (".safetensors", ".strategy.safetensors"):
        path = round_file(run_dir, number, suffix)
        if path.name in meta["files"]:
            data = _read(path)
            if hashlib.sha256(data).hexdigest() != meta["files"][path.name]:
                raise CheckpointError(f"{path}: torn or changed, its sha256 is not the one in the JSON")
            groups[suffix] = _parse(path, data)
    if ".safetensors" not in groups:
        raise CheckpointError(f"{round_file(run_dir, number, '.json')}: names no weights")
    return Round(number, groups[".safetensors"], groups.get(".strategy.safetensors", {}), meta)


def read_meta(run_dir: Path, number: int) -> dict[str, Any]:
    """Read the JSON of a round.

    Raises:
        CheckpointError: missing, torn, or of another number.
    """
    path = round_file(run_dir, number, ".json")
    try:
        meta = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: torn, not JSON") from error
    if not isinstance(meta, dict) or meta.get("round") != number or not isinstance(meta.get("files"), dict):
        raise CheckpointError(f"{path}: not the JSON of round {number}")
    return meta


def weights_sha256(meta: Mapping[str, Any]) -> str:
    """Return the hash of a round's weights, the ``parent`` of the next."""
    return meta["files"][round_file(Path(), meta["round"]).name]


def latest(run_dir: Path) -> int | None:
    """Return the number of the newest whole round, None when there is none."""
    for number in sorted(_numbers(run_dir), reverse=True):
        with contextlib.suppress(CheckpointError):
            return read_round(run_dir, number).number
    return None


def has_rounds(run_dir: Path) -> bool:
    """Whether a folder holds anything of an earlier run's rounds, whole or torn.

    Initial weights whose JSON was never written are no round: the run ended before it began.
    """
    files = {path.name for path in (run_dir / ROUNDS).glob("round_*")}
    return bool(files - {round_file(run_dir, 0).name})


def _numbers(run_dir: Path) -> list[int]:
    matches = (_META.fullmatch(path.name) for path in (run_dir / ROUNDS).glob("round_*.json"))
    return [int(match[1]) for match in matches if match]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: torn, not safetensors ({error})") from error
    found, told = _seal(data)
    if told is not None and found != told:
        raise CheckpointError(f"{path}: torn or changed, its sha256 is not the one that it holds")
    return tensors


def _seal(data: bytes | bytearray) -> tuple[str, str | None]:
    """Digest names, shapes and values of safetensors bytes; and the digest that their metadata tell."""
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    told = head.pop("__metadata__", {}).get(SEAL)
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    digest.update(memoryview(data)[8 + size :])
    return digest.hexdigest(), told
