"""A sweep is the product of its axes, cell by cell as written out by hand."""

import itertools

import pytest

from sparsecontrast import sweeps
from sparsecontrast.config import alternatives, compose
from sparsecontrast.errors import ConfigError
from sparsecontrast.overrides import key_of
from sparsecontrast.sweeps import plan

GRID = {
    "axes": {
        "seed": "0,1",
        "epsilon": {
            8: ["privacy=dp_sgd", "privacy.target_epsilon=8", "privacy.insecure_seed=${seed}",
                "method=patch_contrast"],
            "inf": ["privacy=none", "train.lr=0.1"],
        },
        "start": {"random": None, "old": ["init=<old>", "site.state_dir=<folder>/own"]},
    },
    "before": {
        "old": {"axes": ["seed"], "overrides": ["data.phantom.seed=9", "privacy=none", "method.keep=1.0"]}
    },
}  # fmt: skip


@pytest.fixture
def grid(monkeypatch):
    """An experiment that brings a grid along."""
    real, held = sweeps.raw_tree, dict(GRID)

    def brings(words):
        plain = [w for w in words if key_of(w) != "experiment"]
        return {
            **real(plain if any(key_of(w) == "output_dir" for w in plain) else ["output_dir=out", *plain]),
            "sweep": held,
        }

    monkeypatch.setattr(sweeps, "raw_tree", brings)
    return held


def told(job):
    """The words of a run but for its folders."""
    return sorted(w for w in job.words if key_of(w) not in ("output_dir", "data.cache_dir"))


def test_overrides_in_hydras_grammar_are_multiplied_out():
    words = ["seed=0,1", "method.keep=choice(0.5,1.0)", "federation.rounds=range(1,7,3)", "train.lr=0.1"]
    found = plan([*words, "output_dir=out"])
    product = itertools.product((0, 1), (0.5, 1.0), (1, 4))
    assert [told(job) for job in found.cells] == [
        sorted(["train.lr=0.1", f"seed={s}", f"method.keep={k}", f"federation.rounds={r}"])
        for s, k, r in product
    ]
    assert found.before == () and found.folder == "out"
    assert [job.folder for job in found.cells[:2]] == [
        "out/method.keep_0.5-federation.rounds_1/seed_0", "out/method.keep_0.5-federation.rounds_4/seed_0"
    ]  # fmt: skip
    for job in found.cells:
        config = compose(job.words)
        assert config.output_dir == job.folder and config.data.cache_dir == "out/cache"
        assert str(config.seed) == job.values["seed"]


def test_a_grid_of_named_points_is_what_it_is_by_hand(grid):
    private = ["privacy=dp_sgd", "privacy.target_epsilon=8", "privacy.insecure_seed=${seed}",
               "method=patch_contrast"]  # fmt: skip
    plain = ["privacy=none", "train.lr=0.1"]
    old = "init='out/old/seed_{0}'"
    by_hand = [
        sorted([f"seed={s}", *epsilon, *start])
        for s in (0, 1)
        for name, epsilon in (("8", private), ("inf", plain))
        for start in ([], [old.format(s), f"site.state_dir='out/epsilon_{name}-start_old/seed_{s}/own'"])
    ]
    found = plan(["experiment=privacy_sweep"])
    cells = [[w for w in told(job) if key_of(w) != "experiment"] for job in found.cells]
    assert cells == by_hand
    assert [job.values for job in found.cells[:3]] == [
        {"seed": "0", "epsilon": "8", "start": "random"},
        {"seed": "0", "epsilon": "8", "start": "old"},
        {"seed": "0", "epsilon": "inf", "start": "random"},
    ]
    assert found.cells[0].group == (("epsilon", "8"), ("start", "random")) == found.cells[4].group


def test_the_runs_before_are_made_once_for_their_axes(grid):
    found = plan(["experiment=privacy_sweep", "method.keep=0.4"])
    assert [job.name for job in found.before] == ["old/seed_0", "old/seed_1"]
    assert all(job.pretraining for job in found.before) and not any(job.pretraining for job in found.cells)
    # what it is wins over what is said of every run
    assert [w for w in told(found.before[1]) if key_of(w) != "experiment"] == [
        "data.phantom.seed=9", "method.keep=1.0", "privacy=none", "seed=1"
    ]  # fmt: skip
    assert plan(["experiment=privacy_sweep", "start=random"]).before == ()


def test_a_point_may_refer_to_what_each_run_is_told(grid):
    cell = plan(["experiment=privacy_sweep", "epsilon=8", "start=random"]).cells[1]
    config = compose([w for w in cell.words if key_of(w) != "experiment"])
    assert (config.seed, config.privacy.insecure_seed) == (1, 1)


def test_words_choose_points_and_win_over_them(grid):
    found = plan(["experiment=privacy_sweep", "epsilon=inf,8", "start=random", "seed=5", "train.lr=0.3"])
    assert [job.values for job in found.cells] == [
        {"seed": "5", "epsilon": e, "start": "random"} for e in ("inf", "8")
    ]
    assert [w for w in found.cells[0].words if key_of(w) == "train.lr"] == ["train.lr=0.3"]
    (only,) = plan(
        ["experiment=privacy_sweep", "epsilon=8", "start=old", "seed=5", "output_dir=elsewhere"]
    ).cells
    assert only.values["epsilon"] == "8"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["epsilon=3"], r"the axis epsilon has no point 3; it has \['8', 'inf'\]"),
        (["train.lr=interval(0,1)"], "a sweep without an end"),
        (["seed=0,"], "not an override"),
        (["experiment=laptop,multisite_cxr"], "one experiment at a time"),
    ],
)
def test_what_cannot_be_multiplied_out_is_refused(grid, words, says):
    with pytest.raises(ConfigError, match=says):
        plan(words)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"axis": {}}, "has the keys axes and before"),
        ({"axes": {"epsilon": {"8": "privacy=none"}}}, "sweep.axes.epsilon"),
        ({"axes": {"start": {"old": ["init=<older>"]}}}, "<older> is neither"),
        ({"axes": {"start": {"old": ["init=<old>"]}}, "before": {"old": ["x"]}}, "sweep.before.old"),
    ],
)
def test_a_grid_that_is_not_in_order_is_refused(grid, broken, says):
    grid.clear()
    grid.update(broken)
    with pytest.raises(ConfigError, match=says):
        plan(["experiment=privacy_sweep"])


def test_folders_are_plain_and_no_two_are_alike():
    found = plan(["data.root='/a b/c','/a_b/c',/a-b", "evaluation.tasks=[{a: 1}],[]", "output_dir=out"])
    names = [job.name for job in found.cells]
    assert len(set(names)) == 6 and all("/" not in name and " " not in name for name in names)
    assert compose(found.cells[0].words).data.root == "/a b/c"


def test_only_sweeps_have_alternatives():
    assert alternatives("seed=1,2") == ["seed=1", "seed=2"]
    assert alternatives("+data@x=csv,nih") == ["+data@x=csv", "+data@x=nih"]
    for word in ("seed=1", "train.crop_area=[0.5,1.0]", "evaluation.tasks=[{a: 1, b: 2}]", "data.root='a,b'",
                 "~data.root"):  # fmt: skip
        assert alternatives(word) is None
