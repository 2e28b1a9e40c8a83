import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsecontrast.data import store
from sparsecontrast.data.store import open_pixels
from sparsecontrast.errors import StorageError
from tests.image_files import SIZE, expected, leftovers, make_files, reading, reads, stores, tasks_of

ROOT = Path(__file__).parents[1]


def test_pixels_are_decoded_once_and_are_the_files(tmp_path):
    files = make_files(tmp_path / "in", 7)
    first = open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    again = open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert isinstance(again.images, np.memmap)
    assert (first.images == expected(files)).all() and (again.images == expected(files)).all()
    assert reads(tmp_path / "in") == [f.name for f in files]
    assert first.shapes.tolist() == [[40, 40] if i % 2 else [30, 48] for i in range(7)]


def test_another_order_or_a_part_reads_no_file_again(tmp_path):
    files = make_files(tmp_path / "in", 9)
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    for chosen in (files[::-1], files[2:5], [files[8], files[0]]):
        found = open_pixels(tasks_of(chosen), SIZE, tmp_path / "cache", reading)
        assert (found.images == expected(chosen)).all()
    assert len(reads(tmp_path / "in")) == 9
    open_pixels(tasks_of(files[:2]), 16, tmp_path / "cache", reading)  # another size is another matter
    assert len(reads(tmp_path / "in")) == 11


def test_writing_to_an_image_never_reaches_the_disk(tmp_path):
    files = make_files(tmp_path / "in", 2)
    found = open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    found.images[:] = 0
    assert (open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading).images == expected(files)).all()


# --- torn and stale stores are rebuilt, never trusted


def truncate(folder: Path) -> None:
    with (folder / "pixels.u8").open("r+b") as file:
        file.truncate(SIZE * SIZE * 3)


def flip(name: str, at: float):
    def act(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x01
        (folder / name).write_bytes(data)

    return act


def grow(folder: Path) -> None:
    with (folder / "pixels.u8").open("ab") as file:
        file.write(b"x")


DAMAGES = {
    "truncated": truncate,
    "grown": grow,
    "first byte": flip("pixels.u8", 0),
    "middle byte": flip("pixels.u8", 0.5),
    "last byte": flip("pixels.u8", 1),
    "header shape": lambda f: (f / "header.json").write_text(
        (f / "header.json").read_text().replace("[40,", "[41,")
    ),
    "header byte": flip("header.json", 0.4),
    "no header": lambda f: (f / "header.json").unlink(),
    "no pixels": lambda f: (f / "pixels.u8").unlink(),
    "empty header": lambda f: (f / "header.json").write_text(""),
    "other header": lambda f: (f / "header.json").write_text('{"body": 3}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_store_is_rebuilt(tmp_path, damage):
    files = make_files(tmp_path / "in", 5)
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    before = {p.name: p.read_bytes() for p in stores(tmp_path / "cache")[0].iterdir()}
    DAMAGES[damage](stores(tmp_path / "cache")[0])
    after = {p.name: p.read_bytes() for p in stores(tmp_path / "cache")[0].iterdir()}
    assert before != after
    found = open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert (found.images == expected(files)).all() and found.shapes.tolist()[1] == [40, 40]
    assert len(reads(tmp_path / "in")) == 10
    assert len(stores(tmp_path / "cache")) == 1 and not leftovers(tmp_path / "cache")


def test_damaged_donor_is_not_copied_from(tmp_path):
    files = make_files(tmp_path / "in", 5)
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    flip("pixels.u8", 0.1)(stores(tmp_path / "cache")[0])
    found = open_pixels(tasks_of(files[:2]), SIZE, tmp_path / "cache", reading)
    assert (found.images == expected(files[:2])).all() and len(reads(tmp_path / "in")) == 7


def test_changed_file_is_read_again_and_the_stale_store_goes(tmp_path):
    files = make_files(tmp_path / "in", 5)
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    Image.fromarray(np.full((40, 40), 77, dtype=np.uint8)).save(files[3])
    found = open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert (found.images == expected(files)).all() and (found.images[3] == 77).all()
    assert reads(tmp_path / "in")[5:] == [files[3].name]
    assert len(stores(tmp_path / "cache")) == 1


def test_changed_mtime_alone_is_reason_to_read_again(tmp_path):
    files = make_files(tmp_path / "in", 3)
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    state = files[1].stat()
    os.utime(files[1], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert reads(tmp_path / "in")[3:] == [files[1].name]


def test_code_that_decodes_otherwise_is_reason_to_read_again(tmp_path, monkeypatch):
    files = make_files(tmp_path / "in", 3)
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    source = Path(store.__file__)
    copy = tmp_path / "code"
    copy.mkdir()
    for file in source.parent.glob("*.py"):
        (copy / file.name).write_text(file.read_text())
    monkeypatch.setattr(store, "__file__", str(copy / "store.py"))
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert len(reads(tmp_path / "in")) == 3  # the same code elsewhere
    (copy / "images.py").write_text((copy / "images.py").read_text() + "\n")
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert len(reads(tmp_path / "in")) == 6


def test_a_larger_store_replaces_the_smaller_one_and_a_smaller_one_does_not(tmp_path):
    files = make_files(tmp_path / "in", 6)
    part = open_pixels(tasks_of(files[:3]), SIZE, tmp_path / "cache", reading)
    open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert len(stores(tmp_path / "cache")) == 1
    assert (part.images == expected(files[:3])).all()  # still mapped by its user
    open_pixels(tasks_of(files[:3]), SIZE, tmp_path / "cache", reading)
    assert len(stores(tmp_path / "cache")) == 2 and len(reads(tmp_path / "in")) == 6


# --- processes


def script(folder: Path, workers: int, guard: bool = True) -> subprocess.Popen:
    """Build a cache of folder/in in another Python, which prints when it is done."""
    lines = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "from pathlib import Path",
        "from sparsecontrast.data.store import open_pixels",
        "from tests.image_files import SIZE, reading, tasks_of",
        "if __name__ == '__main__':" if guard else "if True:",
        f"    files = sorted(Path({str(folder)!r}, 'in').glob('*.png'))",
        f"    open_pixels(tasks_of(files), SIZE, Path({str(folder)!r}, 'cache'), reading, {workers})",
        "    print('done', flush=True)",
    ]
    (folder / "script.py").write_text("\n".join(lines))
    command = [sys.executable, str(folder / "script.py")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_killed_build_leaves_nothing_that_counts(tmp_path):
    files = make_files(tmp_path / "in", 40, "slow")
    process = script(tmp_path, workers=1)
    until(lambda: len(reads(tmp_path / "in")) > 5)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert leftovers(tmp_path / "cache") and not stores(tmp_path / "cache")
    found = open_pixels(tasks_of(files), SIZE, tmp_path / "cache")
    assert (found.images == expected(files)).all() and not leftovers(tmp_path / "cache")


def test_workers_end_with_a_killed_parent(tmp_path):
    make_files(tmp_path / "in", 64, "slow")
    process = script(tmp_path, workers=2)
    until(lambda: len(reads(tmp_path / "in")) > 5)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    workers = {int(x.split()[1]) for x in (tmp_path / "in" / "reads.log").read_text().splitlines()}
    assert process.pid not in workers
    until(lambda: all(gone(pid) for pid in workers), 10)


def test_script_without_a_main_guard_ends_and_decodes(tmp_path):
    files = make_files(tmp_path / "in", 20)
    out, err = script(tmp_path, workers=2, guard=False).communicate(timeout=60)
    assert out.decode().split() == ["done"], err.decode()
    assert (open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading).images == expected(files)).all()
    assert len(reads(tmp_path / "in")) == 20


def test_two_builders_at_once_decode_once(tmp_path):
    files = make_files(tmp_path / "in", 10, "slow")
    both = [script(tmp_path, workers=1) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert out.decode().split() == ["done"], err.decode()
    found = open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert (found.images == expected(files)).all()
    assert sorted(reads(tmp_path / "in")) == [f.name for f in files]


def test_full_disk_is_a_clear_error_and_leaves_no_torn_store(tmp_path, monkeypatch):
    files = make_files(tmp_path / "in", 4)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        with pytest.raises(StorageError, match="No space left.*data.cache_dir"):
            open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading)
    assert not stores(tmp_path / "cache") and not leftovers(tmp_path / "cache")
    assert (open_pixels(tasks_of(files), SIZE, tmp_path / "cache", reading).images == expected(files)).all()


def test_unwritable_cache_folder_is_a_clear_error(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        open_pixels(tasks_of(make_files(tmp_path / "in", 1)), SIZE, tmp_path / "cache", reading)
