import multiprocessing
import stat
import threading

import pytest

from sparsecontrast.data.pseudonyms import KEY_FILE, load_key, pseudonym
from sparsecontrast.errors import StorageError


def test_the_key_is_private_whole_and_kept(tmp_path):
    state = tmp_path / "new" / "state"
    key = load_key(state)
    assert len(key) == 32 and load_key(state) == key
    assert stat.S_IMODE((state / KEY_FILE).stat().st_mode) == 0o600
    assert [p.name for p in state.iterdir()] == [KEY_FILE]
    assert load_key(tmp_path / "other") != key
    (state / KEY_FILE).write_bytes(key[:10])
    with pytest.raises(StorageError, match="10 bytes are no key"):
        load_key(state)


def test_many_at_once_agree_on_one_key(tmp_path):
    gate, found = threading.Barrier(16), []

    def load():
        gate.wait()
        found.append(load_key(tmp_path))

    threads = [threading.Thread(target=load) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len(set(found)) == 1
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(load_key, [tmp_path] * 2) == found[:2]


def test_a_pseudonym_needs_its_key_and_its_kind():
    names = {pseudonym(k, kind, "4711") for k in (b"a" * 32, b"b" * 32) for kind in ("patient", "study")}
    assert len(names) == 4 and all(len(n) == 16 and int(n, 16) >= 0 for n in names)
