import dataclasses
import math
import typing

import pytest

from sparsecontrast.classify.settings import compose_classify
from sparsecontrast.config import (
    CONFIG_DIR,
    anchored,
    as_dict,
    compose,
    compose_method,
    site_state_dir,
    split_overrides,
)
from sparsecontrast.errors import ConfigError
from sparsecontrast.federated import compose_run
from sparsecontrast.ranges import RANGES, check_range
from sparsecontrast.settings import Config, MethodConfig, MiramConfig


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
        ("train.batch_size=1", r"train\.batch_size=1: must be in \[2, "),
        ("method.keep=0", "method.keep"),
        ("method.keep=0.1", "method.keep"),
        ("federation.fraction=1.5", "federation.fraction"),
        ("federation.min_sites=11", "federation.min_sites"),
        ("federation.payload_dtype=int3", "fp16"),
        ("backbone.img_size=100", "multiple"),
        ("data.val_fraction=0.9", "data.val_fraction"),
        ("data.val_fraction=-0.1", "data.val_fraction"),
        ("method.dense_start=0.96", r"dense_start \+ method.dense_end"),
        ("train.crop_area=[0.9,0.8]", "low <= high"),
        ("train.crop_area=[0.8]", "low <= high"),
        ("evaluation.keep=foo", "evaluation.keep=foo: must be dense, sparse or a number in"),
        ("evaluation.keep=0.2", r"number in \[0.25, 1\]"),
        ("evaluation.keep=nan", "evaluation.keep=nan"),
        ("federation.update_norm=0", "update_norm=0.0: must be auto, none or a positive number"),
        ("federation.update_norm=some", "update_norm=some: must be auto"),
        ("federation.update_norm=inf", "update_norm"),
        ("evaluation.baselines=[pixels,foo]", r"\['foo'\]; known: pixels"),
        ("evaluation.label_fractions=[]", "evaluation.label_fractions"),
        ("privacy.target_epsilon=3", "means nothing under privacy=none; choose privacy=dp_sgd"),
        ("privacy.insecure_seed=0", "privacy.insecure_seed=0: means nothing under privacy=none"),
        ("seed=0.5", "seed"),
        ("selection=best", "selection"),
        ("seed", "seed"),
        ("method.name=moco", "method.name='moco': must be one of sparse_contrast, .*, miram"),
    ],
)
def test_bad_override_is_one_clear_error(override, says):
    with pytest.raises(ConfigError, match=says):
        compose([override])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.mask_ratio=0.999", "of 196 patches 0 stay visible"),
        ("method.mask_ratio=0.001", "of 196 patches 196 stay visible"),
        ("method.upsample=3", "method.upsample=3: must be one of 1, 2, 4"),
        ("method.upsample=1", r"no higher resolution then; set method.high_weight=0"),
        ("backbone.patch_size=14 method.upsample=4", "must divide backbone.patch_size=14"),
        ("method.decoder_dim=66", "method.decoder_dim=66: must be a multiple of 4"),
        ("method.decoder_heads=3", "and of method.decoder_heads=3"),
        ("method.attention=flash", "method.attention='flash': must be one of softmax, linformer"),
        ("evaluation.keep=sparse", "method=miram chooses no regions"),
        ("evaluation.keep=auto", "method=miram chooses no regions"),
        ("method.keep=0.5", "Could not override 'method.keep'"),
    ],
)
def test_a_bad_override_of_miram_is_one_clear_error(override, says):
    with pytest.raises(ConfigError, match=says):
        compose(f"method=miram {override}")


def test_methods_have_keys_of_their_own():
    config = compose("method=miram method.mask_ratio=0.9")
    assert isinstance(config.method, MiramConfig) and config.method.mask_ratio == 0.9
    assert compose("method=miram method.upsample=1 method.high_weight=0").method.upsample == 1
    assert isinstance(compose().method, MethodConfig)


def test_an_experiment_written_for_a_contrast_runs_miram_too():
    assert compose("experiment=laptop").method.projection_hidden == 256
    assert compose("experiment=laptop method=miram").backbone.depth == 2
    with pytest.raises(ConfigError, match=r"unknown \['projection_hidden'\]"):
        compose("experiment=laptop method=miram method.projection_hidden=64")


def numbers(cls: type = Config, where: str = "") -> dict[str, str]:
    """Every key of the configuration that takes a number, in a list or not, and its type."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= numbers(typing.cast(type, hint), f"{where}{name}.")
        elif hint == MethodConfig | MiramConfig:
            found |= numbers(MethodConfig, "method.") | numbers(MiramConfig, "method.")
        elif {int, float} & {hint, *typing.get_args(hint)}:
            found[where + name] = str(hint)
    return found


def test_every_number_has_a_range():
    by_relation = {"evaluation.keep", "federation.update_norm"}  # a name or a number
    assert set(numbers()) - by_relation == set(RANGES)


KINDS = dict.fromkeys(("backbone.tiles", "backbone.halo"), ["backbone=convnext_atto"])
OF_MIRAM = [f"method.{f.name}" for f in dataclasses.fields(MiramConfig) if f.name not in ("name", "cell")]
KINDS |= dict.fromkeys(OF_MIRAM, ["method=miram"])


@pytest.mark.parametrize("key", RANGES)
def test_a_number_outside_its_range_is_refused(key):
    low, high, ends = RANGES[key]
    whole = "float" not in numbers()[key]
    step = 1 if whole else 1e-3
    wrong = [low - step if ends[0] == "[" else low]
    wrong += [] if math.isinf(high) else [high + step if ends[1] == "]" else high]
    for value in wrong:
        text = f"[{value}]" if "tuple" in numbers()[key] else str(value)
        with pytest.raises(ConfigError) as caught:
            compose([*KINDS.get(key, []), f"{key}={text}"])
        assert str(caught.value).startswith(f"{key}=") and ": must be in " in str(caught.value)


@pytest.mark.parametrize("key", [key for key, hint in numbers().items() if "float" in hint])
@pytest.mark.parametrize("value", ["1e400", "nan"])
def test_a_number_that_is_not_finite_is_refused(key, value):
    text = f"[{value}]" if "tuple" in numbers()[key] else value
    with pytest.raises(ConfigError, match=rf"^{key}(\[0\])?=.*: must be a finite number"):
        compose([*KINDS.get(key, []), f"{key}={text}"])


@pytest.mark.parametrize("value", ["-1e400", "1" + "0" * 400], ids=["negative", "whole"])
def test_infinity_of_either_sign_and_of_whole_numbers_is_refused(value):
    with pytest.raises(ConfigError, match=r"^train\.lr=.*: must be a finite number"):
        compose([f"train.lr={value}"])


def test_numbers_without_a_type_of_their_own_are_finite_too():
    with pytest.raises(ConfigError, match=r"federation\.options\.server_learning_rate=inf: must be a finite"):
        compose(["federation.options={server_learning_rate: 1e400}"])
    with pytest.raises(ConfigError, match=r"evaluation\.tasks\[0\]\.labels\[1\]=nan"):
        compose(["evaluation.tasks=[{labels: [a, nan]}]"])


@pytest.mark.parametrize(
    "key", ["seed", "data.phantom.seed", "backbone.img_size", "federation.rounds", "train.threads"]
)
def test_a_whole_number_of_many_digits_is_refused(key):
    with pytest.raises(ConfigError, match=key):
        compose([f"{key}={'9' * 23}"])


def test_a_number_longer_than_python_reads_is_refused():
    with pytest.raises(ConfigError, match="4300 digits"):
        compose([f"seed={'9' * 5000}"])


def test_the_ends_of_a_range_belong_to_it_or_not():
    told = [
        "method.explore=1",
        "method.momentum=1",
        "federation.connect_timeout=0",
        "seed=9223372036854775807",
    ]
    config = compose([*told, "method.dense_start=0.95", "evaluation.keep=0.25", "train.crop_area=[1,1]"])
    assert (config.method.explore, config.seed, config.train.crop_area) == (1, 2**63 - 1, (1, 1))
    assert compose(["backbone.depth=null", "data.merge_sites_to=null"]).backbone.depth is None
    check_range("x", 0, (0, 1, "[)"))
    for number, ends in ((1, "[)"), (0, "(]"), (0, "()"), (math.nan, "[]")):
        with pytest.raises(ConfigError, match=rf"x={number}: must be in \{ends[0]}0, 1\{ends[1]}"):
            check_range("x", number, (0, 1, ends))


OWN_LOOP = CONFIG_DIR / "method" / "a2a.yaml"  # trains when it is used, never before
CHOICES = sorted(set(CONFIG_DIR.glob("*/*.yaml")) - {OWN_LOOP})


@pytest.mark.parametrize("path", CHOICES, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_config_file_composes(path):
    classifies = path.parent.name == "cells" or path.stem == "sparse_attn_net"
    config = (compose_classify if classifies else compose_run)([f"{path.parent.name}={path.stem}"])
    assert dataclasses.is_dataclass(config)


def test_a_classifier_is_told_from_a_pretraining_method():
    with pytest.raises(ConfigError, match=r"sparse_attn_net: classifies .* `sparsecontrast classify train`"):
        compose("method=sparse_attn_net")
    with pytest.raises(ConfigError, match=r"method=dense_contrast: pretrains without labels"):
        compose_classify("method=dense_contrast")


def test_a_method_with_a_loop_of_its_own_is_no_run_and_names_its_command():
    assert OWN_LOOP.exists()
    with pytest.raises(ConfigError, match="sparsecontrast denoise FILE.npz"):
        compose("method=a2a")
    assert compose_method("a2a", ["seed=3", "method.steps=7"])["seed"] == 3
    with pytest.raises(ConfigError, match="strps"):
        compose_method("a2a", ["method.strps=7"])


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_states_its_command_duration_and_number(path):
    head = path.read_text().split("defaults:")[0]
    assert all(f"#   {word}:" in head for word in ("command", "takes", "expect")), path


def test_a_private_site_says_what_it_promises():
    config = compose("privacy=dp_sgd privacy.target_epsilon=3").privacy
    assert (config.name, config.target_epsilon, config.delta, config.noise_multiplier) == (
        "dp_sgd",
        3,
        None,
        None,
    )
    assert as_dict(compose().privacy) == {k: None for k in as_dict(config)} | {"name": "none"}
    for key in ("target_epsilon", "max_grad_norm", "sample_rate", "planned_rounds", "images_per_patient"):
        with pytest.raises(ConfigError, match=rf"privacy\.{key}: must not be null under privacy=dp_sgd"):
            compose(["privacy=dp_sgd", f"privacy.{key}=null"])
    with pytest.raises(
        ConfigError, match="planned_rounds x privacy.steps_per_round = 1000000000: must be at"
    ):
        compose("privacy=dp_sgd privacy.planned_rounds=1000000 privacy.steps_per_round=1000")


def test_selection_reaches_the_method():
    assert compose("selection=random").method.selection == "random"
    assert compose("method.selection=random").method.selection == "random"
    # the dense baseline has no scorer to choose by: it has its own word, unless told by the key's full name
    assert compose("selection=random method=dense_contrast").method.selection == "centre"
    assert compose("method=dense_contrast method.selection=random").method.selection == "random"


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
