"""Make ``flwr run . --stream`` mean ten hospitals, offline, in this environment.

Flower starts two SuperNodes of two CPUs each unless its home folder says otherwise, and lets the
SuperLink install the app's dependencies anew, which needs a network. Neither can be said in
``pyproject.toml``. So ``python -m simulation.flower_home``, a step of ``make setup``,

- writes ``.flwr/config.toml`` beside ``pyproject.toml``: a connection with ten SuperNodes, one CPU each;
- leaves a ``.pth`` file in this virtual environment that sets the variables below where they are not
  set yet, so ``FLWR_HOME=... flwr ...`` still does what it says.
"""

import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ".flwr"
CONFIG = """[superlink]
default = "local"

[superlink.local]
address = ":local:"
options.num-supernodes = 10
options.backend.name = "ray"
options.backend.client-resources.num-cpus = 1
"""
VARIABLES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}


def write(root: Path, packages: Path) -> None:
    """Write Flower's home below ``root`` and the ``.pth`` into ``packages``; an edited home is kept."""
    home = root / HOME
    home.mkdir(exist_ok=True)
    if not (home / "config.toml").exists():
        (home / "config.toml").write_text(CONFIG, encoding="utf-8")
    settings = {**VARIABLES, "FLWR_HOME": str(home)}
    line = f"import os; [os.environ.setdefault(k, v) for k, v in {settings!r}.items()]\n"
    (packages / "sparsecontrast-flower.pth").write_text(line, encoding="utf-8")


def main() -> int:
    """Write both into the running virtual environment; returns the exit status."""
    if sys.prefix == sys.base_prefix:
        print("error [config]: run this with the Python of a virtual environment", file=sys.stderr)
        return 2
    write(ROOT, Path(sysconfig.get_path("purelib")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
