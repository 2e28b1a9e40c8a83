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
