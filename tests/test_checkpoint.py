import json
import multiprocessing
import os
import resource
import signal

import pytest
import safetensors.torch
import torch

from sparsecontrast import checkpoint
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import CheckpointError, StorageError


def weights(seed, size=100):
    return {"backbone.w": torch.randn(size, generator=torch.Generator().manual_seed(seed))}


def three_rounds(folder):
    parent = None
    for number in range(3):
        meta = {"parent": parent, "run_key": "ab" * 8}
        whole = checkpoint.write_round(folder, number, weights(number), meta, {"m_t": torch.ones(2)})
        parent = checkpoint.weights_sha256(whole)


def test_a_round_comes_back_whole(tmp_path):
    three_rounds(tmp_path)
    read = checkpoint.read_round(tmp_path, 2)
    assert torch.equal(read.tensors["backbone.w"], weights(2)["backbone.w"])
    assert torch.equal(read.strategy["m_t"], torch.ones(2))
    assert read.meta["round"] == 2
    assert read.meta["parent"] == checkpoint.weights_sha256(checkpoint.read_meta(tmp_path, 1))
    assert checkpoint.latest(tmp_path) == 2
    assert {p.name for p in (tmp_path / "rounds").iterdir() if "0002" in p.name} == {
        "round_0002.safetensors",
        "round_0002.strategy.safetensors",
        "round_0002.json",
    }


def test_equal_tensors_make_equal_files(tmp_path):
    a = checkpoint.write_tensors(tmp_path / "a", {"x": torch.ones(3), "y": torch.zeros(2)})
    b = checkpoint.write_tensors(tmp_path / "b", {"y": torch.zeros(2), "x": torch.ones(3)})
    assert a == b
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flipped_bit_anywhere_in_a_file_of_tensors_is_noticed_or_changes_nothing(tmp_path):
    """Names, shapes and values are sealed; a bit of the seal's own name says nothing of them."""
    path, given = tmp_path / "state", {"optimizer.step.w": torch.ones(1), "local.w": torch.arange(6.0)}
    checkpoint.write_tensors(path, given)
    whole, noticed = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            read = checkpoint.read_tensors(path)
            assert {k: v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in given.items()}, (
                place
            )
        except CheckpointError:
            noticed += 1
    assert noticed >= len(whole) - len("sha256") - len("__metadata__")


def test_a_foreign_file_without_a_seal_is_read(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "timm", metadata={"format": "pt"})
    assert checkpoint.read_tensors(tmp_path / "timm")["w"].tolist() == [1, 1]


def test_empty_folder_has_no_latest(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert not checkpoint.has_rounds(tmp_path)
    # initial weights without their JSON are no round; anything else is a run's
    checkpoint.write_tensors(checkpoint.round_file(tmp_path, 0), weights(0))
    assert not checkpoint.has_rounds(tmp_path)
    checkpoint.write_tensors(checkpoint.round_file(tmp_path, 1), weights(1))
    assert checkpoint.has_rounds(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".strategy.safetensors", ".json"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_latest_skips_a_torn_round(tmp_path, suffix, keep):
    three_rounds(tmp_path)
    path = checkpoint.round_file(tmp_path, 2, suffix)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert checkpoint.latest(tmp_path) == 1
    with pytest.raises(CheckpointError):
        checkpoint.read_round(tmp_path, 2)


@pytest.mark.parametrize("suffix", [".safetensors", ".strategy.safetensors", ".json"])
def test_latest_skips_a_round_without_one_of_its_files(tmp_path, suffix):
    three_rounds(tmp_path)
    checkpoint.round_file(tmp_path, 2, suffix).unlink()
    assert checkpoint.latest(tmp_path) == 1


def test_one_flipped_bit_of_the_weights_is_noticed(tmp_path):
    three_rounds(tmp_path)
    path = checkpoint.round_file(tmp_path, 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        checkpoint.read_round(tmp_path, 2)


def test_a_json_of_another_round_is_refused(tmp_path):
    three_rounds(tmp_path)
    path = checkpoint.round_file(tmp_path, 2, ".json")
    path.write_bytes(checkpoint.round_file(tmp_path, 1, ".json").read_bytes())
    assert checkpoint.latest(tmp_path) == 1


def test_read_tensors_says_which_file_is_missing_or_torn(tmp_path):
    with pytest.raises(CheckpointError, match="nothing"):
        checkpoint.read_tensors(tmp_path / "nothing.safetensors")
    (tmp_path / "torn").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match="torn"):
        checkpoint.read_tensors(tmp_path / "torn")


def _write_on_a_full_disk(folder, number, limit, pipe):
    """No file of this process may grow beyond ``limit`` bytes: the kernel fails the write itself."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoint.write_round(folder, number, weights(7, 50_000), {"parent": None})
        pipe.send("written")
    except StorageError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("number", [2, 3])  # over an old round, and beside it
def test_a_full_disk_leaves_the_old_rounds_and_nothing_torn(tmp_path, number):
    three_rounds(tmp_path)
    untouched = {p: p.read_bytes() for p in (tmp_path / "rounds").iterdir()}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_write_on_a_full_disk, args=(tmp_path, number, 50_000, theirs))
    process.start()
    process.join(60)
    assert ours.recv().startswith("cannot write")
    assert {p: p.read_bytes() for p in (tmp_path / "rounds").iterdir()} == untouched
    assert checkpoint.latest(tmp_path) == 2


def test_a_rewritten_round_without_its_json_is_torn(tmp_path):
    three_rounds(tmp_path)
    checkpoint.write_tensors(checkpoint.round_file(tmp_path, 2), weights(9))
    assert checkpoint.latest(tmp_path) == 1


def test_a_failing_flush_is_a_storage_error_and_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def no_space(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "rounds").write_text("in the way")
    with pytest.raises(StorageError):
        checkpoint.write_round(tmp_path, 0, weights(0), {})


def test_json_holds_the_hash_of_every_file(tmp_path):
    import hashlib

    three_rounds(tmp_path)
    meta = json.loads(checkpoint.round_file(tmp_path, 1, ".json").read_text())
    assert len(meta["files"]) == 2
    for name, digest in meta["files"].items():
        assert hashlib.sha256((tmp_path / "rounds" / name).read_bytes()).hexdigest() == digest
