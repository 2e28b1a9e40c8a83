import dataclasses

import pytest

from sparsecontrast.config import CONFIG_DIR, anchored, as_dict, compose, site_state_dir, split_overrides
from sparsecontrast.errors import ConfigError


def test_names_that_others_rely_on():
    config = compose(
        "method=dense_contrast backbone=vit_small data=phantom data.root=/x privacy=none federation.rounds=3 "
        "federation.sites=4 federation.fraction=0.5 federation.strategy=fedadam seed=7 output_dir=o resume=r"
    )
    assert (config.method.name, config.backbone.name) == ("dense_contrast", "vit_small_patch16_224")
    assert (config.data.root, config.federation.rounds, config.federation.sites) == ("/x", 3, 4)
    assert (config.federation.fraction, config.federation.strategy, config.seed) == (0.5, "fedadam", 7)
    assert (config.output_dir, config.resume) == ("o", "r")


def test_one_string_of_overrides_as_flower_carries_it():
    text = """
      seed=3  data.root='/a b/c'
      federation.options={server_learning_rate: 0.1, tau: 1e-3}
      evaluation.label_fractions=[0.1, 1.0]
    """
    config = compose(text)
    assert len(split_overrides(text)) == 4
    assert config.data.root == "/a b/c" and config.seed == 3
    assert config.federation.options == {"server_learning_rate": 0.1, "tau": 1e-3}
    assert config.evaluation.label_fractions == (0.1, 1.0)
    assert compose(config.overrides) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("methd=x", "methd"),
        ("method=nope", "sparse_contrast"),
        ("no.such.key=1", "no"),
        ("train.batch_size=many", "train.batch_size"),
        ("train.batch_size=1", "at least 2"),
        ("method.keep=0", "method.keep"),
        ("method.keep=0.1", "method.keep"),
        ("federation.fraction=1.5", "federation.fraction"),
        ("federation.min_sites=11", "federation.min_sites"),
        ("federation.payload_dtype=int3", "fp16"),
        ("backbone.img_size=100", "multiple"),
        ("data.val_fraction=0.9", "data.val_fraction"),
        ("seed=0.5", "seed"),
        ("selection=best", "selection"),
        ("seed", "seed"),
    ],
)
def test_bad_override_is_one_clear_error(override, says):
    with pytest.raises(ConfigError, match=says):
        compose([override])


CHOICES = sorted(CONFIG_DIR.glob("*/*.yaml"))


@pytest.mark.parametrize("path", CHOICES, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_config_file_composes(path):
    config = compose([f"{path.parent.name}={path.stem}"])
    assert dataclasses.is_dataclass(config)


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_states_its_command_duration_and_number(path):
    head = path.read_text().split("defaults:")[0]
    assert all(f"#   {word}:" in head for word in ("command", "takes", "expect")), path


def test_selection_reaches_the_method():
    assert compose("selection=random").method.selection == "random"
    assert compose("selection=random method=dense_contrast").method.selection == "random"


def test_a_config_is_frozen_and_plain():
    config = compose()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    import json

    assert json.loads(json.dumps(as_dict(config)))["seed"] == 0


def test_relative_paths_start_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSECONTRAST_HOME", str(tmp_path))
    assert anchored("a/b") == tmp_path / "a/b" and anchored("/c").as_posix() == "/c"
    assert site_state_dir(compose("output_dir=o"), "s1") == tmp_path / "o/sites/s1"
    assert site_state_dir(compose(f"site.state_dir={tmp_path}/own"), "s1") == tmp_path / "own"
