"""The arrows of the house: who may import whom, and which third party enters by which door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sparsecontrast", "server", "client", "simulation", "benchmarks")
FILES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))

DOORS = {
    # a deployment is measured, and faults are injected, from outside of the apps
    "flwr": (
        "server/",
        "client/",
        "simulation/",
        "benchmarks/deployment.py",
        "benchmarks/first_step.py",
        "benchmarks/fault_cases/",
    ),
    "ray": (),
    "opacus": (
        "sparsecontrast/privacy.py",
        "sparsecontrast/row_gradients.py",
        "benchmarks/rivals/plain_opacus.py",  # what the library replaces is timed and audited beside it
        "benchmarks/one_step.py",
    ),
    "dp_accounting": ("sparsecontrast/accounting.py",),
    "timm": ("sparsecontrast/models/", "sparsecontrast/export.py", "benchmarks/"),
    "onnx": ("sparsecontrast/export_onnx.py",),
    "onnxruntime": ("sparsecontrast/export_onnx.py",),
    "onnxscript": ("sparsecontrast/export_onnx.py",),
    "pydicom": (
        "sparsecontrast/data/images.py",
        "sparsecontrast/data/index.py",
        "sparsecontrast/ultrasound/us_dicom.py",
    ),  # fmt: skip
    "h5py": ("sparsecontrast/ultrasound/acquisition.py",),
    "skimage": ("benchmarks/denoisers.py",),
    "bm3d": ("benchmarks/denoisers.py",),
    "hydra": ("sparsecontrast/config.py",),
    "omegaconf": ("sparsecontrast/config.py",),
}

# a room may import the rooms named for it, and itself
EDGE = ("errors", "settings", "config", "progress", "durable", "processes")
ERRORS = tuple(f"sparsecontrast.{name}" for name in EDGE)
FILE_ROOMS = (*ERRORS, "sparsecontrast.checkpoint", "sparsecontrast.payload", "sparsecontrast.ledger")
DATA = ("sparsecontrast.data",)
MODELS = ("sparsecontrast.models",)
METHODS = (*MODELS, "sparsecontrast.losses", "sparsecontrast.methods")
ULTRASOUND = ("sparsecontrast.ultrasound",)
BOOK = ("sparsecontrast.errors",) + tuple(
    f"sparsecontrast.{name}" for name in ("accounting", "chain", "cohorts", "policy")
)
LIBRARY = ("sparsecontrast",)
ROOMS = {
    "sparsecontrast/errors.py": (),
    "sparsecontrast/structure.py": ("sparsecontrast.errors",),
    "sparsecontrast/ranges.py": ("sparsecontrast.errors",),
    "sparsecontrast/accounting.py": ("sparsecontrast.errors", "sparsecontrast.ranges"),
    "sparsecontrast/levels.py": (),
    "sparsecontrast/settings.py": (),
    "sparsecontrast/relations.py": (
        "sparsecontrast.errors",
        "sparsecontrast.levels",
        "sparsecontrast.ranges",
        "sparsecontrast.settings",
    ),
    "sparsecontrast/config.py": (
        "sparsecontrast.errors",
        "sparsecontrast.ranges",
        "sparsecontrast.relations",
        "sparsecontrast.settings",
        "sparsecontrast.structure",
    ),
    "sparsecontrast/data/": (*ERRORS, *DATA),
    "sparsecontrast/models/": (*ERRORS, *MODELS, "sparsecontrast.levels"),
    "sparsecontrast/losses.py": ERRORS,
    "sparsecontrast/ultrasound/": (*ERRORS, *ULTRASOUND),
    "sparsecontrast/methods/": (*ERRORS, *METHODS, *ULTRASOUND),
    "sparsecontrast/cohorts.py": ("sparsecontrast.errors", "sparsecontrast.accounting"),
    "sparsecontrast/policy.py": ("sparsecontrast.errors", "sparsecontrast.settings"),
    "sparsecontrast/chain.py": ("sparsecontrast.errors", "sparsecontrast.durable"),
    "sparsecontrast/book.py": BOOK,
    "sparsecontrast/payload.py": FILE_ROOMS,
    "sparsecontrast/checkpoint.py": FILE_ROOMS,
    "sparsecontrast/database.py": ("sparsecontrast.errors", "sparsecontrast.durable"),
    "sparsecontrast/ledger.py": (*FILE_ROOMS, *BOOK, "sparsecontrast.book", "sparsecontrast.database"),
    "sparsecontrast/auditing.py": (
        "sparsecontrast.errors",
        "sparsecontrast.probes",
        "sparsecontrast.ranges",
    ),
    "sparsecontrast/noise.py": (),
    "sparsecontrast/sampling.py": ("sparsecontrast.errors", "sparsecontrast.noise"),
    "sparsecontrast/coupling.py": ("sparsecontrast.methods.method",),
    "sparsecontrast/row_gradients.py": (
        *ERRORS,
        "sparsecontrast.methods.method",
        "sparsecontrast.models.rows",
    ),
    "sparsecontrast/privacy.py": (
        *FILE_ROOMS,
        "sparsecontrast.methods.method",  # the protocol alone
        "sparsecontrast.coupling",
        "sparsecontrast.noise",
        "sparsecontrast.row_gradients",
    ),
    "sparsecontrast/batches.py": (*ERRORS, *DATA, *METHODS),
    "sparsecontrast/local_state.py": (*FILE_ROOMS, *METHODS),
    "sparsecontrast/part_round.py": (*FILE_ROOMS, "sparsecontrast.local_state"),
    "sparsecontrast/trainer.py": (
        *FILE_ROOMS,
        *METHODS,
        *(f"sparsecontrast.{name}" for name in ("batches", "local_state", "part_round")),
    ),
    "sparsecontrast/disclosure.py": (
        *(f"sparsecontrast.{name}" for name in ("accounting", "methods.schedule", "settings")),
    ),
    "sparsecontrast/account.py": (*FILE_ROOMS, *BOOK, "sparsecontrast.disclosure", "sparsecontrast.privacy"),
    "sparsecontrast/private_trainer.py": (
        *FILE_ROOMS,
        *METHODS,
        *(f"sparsecontrast.{name}" for name in ("account", "batches", "disclosure", "local_state")),
        *(f"sparsecontrast.{name}" for name in ("noise", "part_round")),
        *(f"sparsecontrast.{name}" for name in ("privacy", "sampling", "trainer")),
    ),
    "sparsecontrast/": LIBRARY,
    "server/": ("server", *LIBRARY),
    "client/": ("client", *LIBRARY),
    "simulation/": ("simulation", "server", "client", *LIBRARY),
    "benchmarks/": ("benchmarks", *LIBRARY),
    "benchmarks/deployment.py": ("benchmarks", "simulation", "server", *LIBRARY),
    "benchmarks/first_step.py": ("benchmarks", "client", *LIBRARY),
    "benchmarks/fault_cases/": ("benchmarks", "simulation", "server", "client", *LIBRARY),
}


def imported(path: Path) -> set[str]:
    """Every module a file imports, at any depth: ``from a import b`` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def under(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def room_of(relative: str) -> tuple[str, ...]:
    best = max((room for room in ROOMS if relative.startswith(room)), key=len)
    return ROOMS[best]


def broken(relative: str, modules: set[str]) -> list[str]:
    """Imports of one file that break an arrow or a door."""
    allowed = room_of(relative)
    wrong = [
        m
        for m in modules
        if under(m, PACKAGES)
        and m not in PACKAGES
        and not under(m, allowed)
        # `from sparsecontrast.data import cache` also names the parent: judged by its child
        and not any(a.startswith(m + ".") for a in allowed)
    ]
    doors = [
        m for m in modules if m.split(".")[0] in DOORS and not relative.startswith(DOORS[m.split(".")[0]])
    ]
    return sorted(wrong + doors)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_and_doors(path):
    relative = str(path.relative_to(ROOT))
    assert broken(relative, imported(path)) == []


@pytest.mark.parametrize(
    ("relative", "module"),
    [
        ("sparsecontrast/trainer.py", "flwr.app"),
        ("sparsecontrast/data/cache.py", "sparsecontrast.methods.method"),
        ("sparsecontrast/payload.py", "sparsecontrast.methods"),
        ("server/app.py", "client.app"),
        ("client/app.py", "simulation.partition"),
        ("sparsecontrast/losses.py", "timm"),
        ("benchmarks/data.py", "simulation.run"),
    ],
)
def test_the_guard_itself_sees_a_broken_arrow(relative, module):
    assert broken(relative, {module}) == [module]


def test_no_junk_drawers():
    assert not [p for p in FILES if p.stem in {"utils", "common", "misc", "base", "helpers"}]
