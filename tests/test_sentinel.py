"""The site's own limits around Flower's process for one message."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.supernode.runtime import run_clientapp

from client import app, sentinel
from sparsecontrast.egress import EgressLog
from sparsecontrast.errors import AppRefusedError, ConfigError, OvertimeError, SparseContrastError, code_of
from sparsecontrast.site_file import parse_site_file

ROOT = Path(__file__).parents[1]
DIGEST = "ab" * 32


def site(**more):
    lines = ["name: x", "state_dir: /nowhere", *(f"{key}: {value}" for key, value in more.items())]
    return parse_site_file(Path("site.yaml"), "\n".join(lines))


def runtime():
    """A copy of Flower's module, so that the real one stays as it is."""
    return SimpleNamespace(**vars(run_clientapp))


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_installed_app_runs_and_the_servers_bundle_is_not_even_unpacked(tmp_path):
    around = runtime()
    sentinel.put_around(around, site(), tmp_path)
    around.install_from_fab(b"not even a zip", skip_prompt=True)
    load = around.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("publisher/evil", "1.0", DIGEST) is app.app


def test_what_flower_says_of_an_exception_stays_at_the_site(tmp_path):
    around = runtime()
    sentinel.put_around(around, site(), tmp_path)
    error = around.Error(code=2, reason="<class 'OSError'>:<'/pacs/DOE^JANE.dcm'>")
    assert error.code == 2 and "DOE" not in str(error.reason)
    assert "/pacs/DOE^JANE.dcm" in (tmp_path / "client.log").read_text()
    (row,) = EgressLog(tmp_path).rows()  # no guard sees this answer
    assert (row.kind, row.content["code"], row.content["site"]) == ("flower", "flower_2", "x")
    EgressLog(tmp_path).path.unlink()
    assert around.Error(code=2, reason="x").code == 2
    assert "without a row" in (tmp_path / "client.log").read_text()


def test_a_bundle_that_the_site_does_not_name_is_refused_before_it_is_unpacked(tmp_path):
    around, installed = runtime(), []
    around.install_from_fab = lambda *told, **_: installed.append(told)
    sentinel.put_around(around, site(app=f"[{DIGEST}]"), tmp_path)
    with pytest.raises(AppRefusedError):
        around.install_from_fab(b"bundle", skip_prompt=True)
    assert not installed and "refused" in (tmp_path / "client.log").read_text()
    assert vars(around)["get_load_client_app_fn"] is vars(run_clientapp)["get_load_client_app_fn"]


def test_a_bundle_that_the_site_names_brings_its_own_code(tmp_path):
    code = """if True:
        import hashlib, sys
        from pathlib import Path
        from types import SimpleNamespace
        from client import sentinel
        from sparsecontrast.site_file import parse_site_file
        digest = hashlib.sha256(b"bundle").hexdigest()
        site = parse_site_file(Path("site.yaml"), f"name: x\\nstate_dir: /nowhere\\napp: [{digest}]")
        around = SimpleNamespace(install_from_fab=lambda b: sorted(sys.modules), Error=None,
            pull_and_inflate_object_from_tree=len)
        sentinel.put_around(around, site, Path(sys.argv[1]))
        left = around.install_from_fab(b"bundle")
        print([name for name in left if name.split(".")[0] in ("client", "sparsecontrast")])
    """
    assert python(code, tmp_path).stdout.strip() == "[]"


def digest(folder):
    command = [sys.executable, "-m", "client.sentinel", "digest", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_the_digest_is_of_what_is_in_the_bundle_and_of_nothing_else(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        for name in ("server", "client", "sparsecontrast", "configs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
    (two / "notes.txt").write_text("not of the app")
    first = digest(one)
    assert len(first) == 64 and first == digest(two)
    with open(two / "client" / "app.py", "a") as file:
        file.write("\n")
    assert digest(two) != first


OVERTIME = """if True:
    import signal, sys, time
    from pathlib import Path
    from client import sentinel
    if sys.argv[2] == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    sentinel.watch(0.3, Path(sys.argv[1]), grace=0.3)
    try:
        time.sleep(50)
    except Exception as error:
        print(error.code)
"""


def test_an_answer_that_takes_too_long_becomes_a_code(tmp_path):
    started = time.monotonic()
    assert python(OVERTIME, tmp_path, "hears").stdout.strip() == OvertimeError.code
    assert time.monotonic() - started < 40


def test_a_process_that_hears_nothing_is_ended_and_the_log_says_so(tmp_path):
    result = python(OVERTIME, tmp_path, "deaf")
    assert result.returncode == 1 and not result.stdout
    assert "hung" in (tmp_path / "client.log").read_text()


HOLDS_THE_INTERPRETER = """if True:
    import os, sys
    from pathlib import Path
    from client import sentinel
    if sys.argv[2] == "forked":
        pid = os.fork()
        if pid:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    sentinel.watch(0.3, Path(sys.argv[1]), grace=0.3)
    sum(range(10**12))  # hours in one call of C, which hears no signal and lets no thread run
"""


@pytest.mark.parametrize("way", ["cold", "forked"])
def test_a_process_that_holds_the_interpreter_is_ended_and_the_log_says_where(tmp_path, way):
    result = python(HOLDS_THE_INTERPRETER, tmp_path / "state", way)
    assert result.returncode == 1 and not result.stdout and not result.stderr
    told = (tmp_path / "state" / "client.log").read_text()
    assert "Timeout (0:00:00" in told and 'File "<string>", line 10 in <module>' in told


def test_where_there_is_no_log_it_is_ended_all_the_same(tmp_path):
    (tmp_path / "state").write_text("a file")
    result = python(HOLDS_THE_INTERPRETER, tmp_path / "state", "cold")
    assert result.returncode == 1 and "Timeout" in result.stderr


def test_a_process_that_ends_in_time_leaves_no_word(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from client import sentinel
        sentinel.watch(30, Path(sys.argv[1]), grace=0.3)
    """
    result = python(code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "") and not (tmp_path / "client.log").read_text()


def test_memory_beyond_the_limit_becomes_a_code_and_the_process_lives():
    code = """if True:
        from client.sentinel import limit_memory
        from sparsecontrast.errors import code_of
        import torch
        limit_memory(4.0)
        for want in (lambda: bytearray(5 * 2**30), lambda: torch.ones(5 * 2**28)):
            try:
                want()
            except Exception as error:
                print(code_of(error))
        print(len(bytearray(2**20)))
    """
    assert python(code).stdout.split() == ["out_of_memory", "out_of_memory", str(2**20)]


def test_other_errors_of_torch_are_not_taken_for_it():
    assert code_of(RuntimeError("shapes cannot be multiplied")) == "internal"
    assert code_of(SparseContrastError("x")) == "internal" and code_of(MemoryError()) == "out_of_memory"


@pytest.mark.parametrize(
    "more",
    [{"app": "latest"}, {"app": "[]"}, {"app": "[abc]"}, {"limits": "{seconds: 0}"}, {"limits": "{hours: 1}"},
     {"limits": "{memory_gib: -1}"}, {"server": "x"}],
)  # fmt: skip
def test_a_site_file_that_cannot_be_meant_is_refused(more):
    with pytest.raises(ConfigError, match="site.yaml"):
        site(**more)
