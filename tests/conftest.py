from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the project; absent, the tests that need it fail rather than skip."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "data"
    assert folder.is_dir(), f"{folder} is missing: it lies beside the project"
    return folder.resolve()
