from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the project; absent, the tests that need it fail rather than skip."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "data"
    assert folder.is_dir(), f"{folder} is missing: it lies beside the project"
    return folder.resolve()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The index of three small sites of PNG files, a, b and c."""
    from tests.federations import write_images  # brings Flower, which most tests do without

    return write_images(tmp_path_factory.mktemp("images"), {"a": 8, "b": 5, "c": 6})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Cells of two labs, disc and ring, one of each kind rare."""
    from tests.cell_files import write_cells

    return write_cells(tmp_path_factory.mktemp("cells") / "drawn", rare=2)


@pytest.fixture(scope="module")
def two_labs(pictures, tmp_path_factory):
    """The folder of a run of both labs, and what they sent; no test changes it."""
    from tests.labs import join

    return join(pictures, tmp_path_factory.mktemp("run") / "out")


@pytest.fixture
def impatient(monkeypatch):
    """A server that does not wait for more sites than have come."""
    monkeypatch.setattr("server.roll.SETTLE_SECONDS", 0.0)
