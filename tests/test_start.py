"""A run that starts from another run's backbone and scorer."""

import pytest
import torch

from sparsecontrast.checkpoint import read_round, round_file, weights_sha256, write_tensors
from sparsecontrast.config import compose
from sparsecontrast.errors import BackboneMismatchError, CheckpointError, ConfigError, MissingDataError
from sparsecontrast.methods import build_method
from sparsecontrast.overrides import assign
from sparsecontrast.start import load_start
from tests.federations import partitions, rows, serve, words
from tests.tiny import make_run


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("server.roll.SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("earlier") / "run")


def equal(one, two):
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_federation_starts_from_backbone_and_scorer_of_another_run(earlier, images, tmp_path, kind):
    given = earlier if kind == "folder" else round_file(earlier, 2)
    told = words(images, tmp_path / "out", assign("init", given), "federation.rounds=1")
    serve(partitions(3), told)
    last, first = read_round(earlier, 2).tensors, read_round(tmp_path / "out", 0).tensors
    assert {name.split(".")[0] for name in first} == {"backbone", "saliency"}
    assert equal(first, last) and not equal(first, read_round(earlier, 0).tensors)
    assert not equal(first, read_round(tmp_path / "out", 1).tensors)
    assert all(row["loss"] > 0 for row in rows(tmp_path / "out"))


def test_pretraining_starts_and_continues_from_it_too(earlier, tmp_path):
    folder = make_run(tmp_path / "run", assign("init", earlier), "federation.rounds=1")
    assert equal(read_round(folder, 0).tensors, read_round(earlier, 2).tensors)
    trained = read_round(folder, 1)
    make_run(tmp_path / "run", f"resume={folder}", "federation.rounds=2", assign("init", earlier))
    assert read_round(folder, 2).meta["parent"] == weights_sha256(trained.meta)


def test_no_init_leaves_a_method_as_it_was_built():
    config = compose(["backbone.img_size=32", "backbone.patch_size=4", "backbone.depth=1"])
    method = build_method(config)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    load_start(method, config)
    assert equal(before, method.state_dict())


def test_without_a_scorer_on_one_side_the_backbone_is_the_start(earlier, tmp_path):
    small = ["backbone.img_size=32", "backbone.patch_size=4", "backbone.depth=1"]

    def load(path, *more):
        config = compose([*small, *more, assign("init", path)])
        method, fresh = build_method(config), build_method(config).state_dict()
        load_start(method, config)
        return method.state_dict(), fresh

    given = read_round(earlier, 2).tensors
    found, fresh = load(earlier, "method=miram", "seed=1")
    for name, tensor in found.items():
        assert torch.equal(tensor, given[name] if name.startswith("backbone.") else fresh[name]), name
    backbone = {n: t + 1 for n, t in given.items() if n.startswith("backbone.")}
    write_tensors(tmp_path / "miram.safetensors", backbone)
    found, fresh = load(tmp_path / "miram.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, backbone.get(name, fresh[name])), name
    write_tensors(tmp_path / "less.safetensors", dict(list(backbone.items())[1:]))
    with pytest.raises(BackboneMismatchError, match="1 tensors"):
        load(tmp_path / "less.safetensors")


def test_what_does_not_fit_is_refused(earlier, tmp_path):
    small = ["backbone.img_size=32", "backbone.patch_size=4", "backbone.depth=1"]

    def load(path, *more):
        config = compose([*small, *more, assign("init", path)])
        load_start(build_method(config), config)

    load(earlier)
    with pytest.raises(BackboneMismatchError, match="same backbone and selection"):
        load(earlier, "selection=attention")
    with pytest.raises(BackboneMismatchError, match="tensors are not this run's"):
        load(earlier, "backbone.patch_size=8")
    with pytest.raises(BackboneMismatchError, match="1 tensors"):
        tensors = read_round(earlier, 2).tensors
        write_tensors(tmp_path / "less.safetensors", dict(list(tensors.items())[1:]))
        load(tmp_path / "less.safetensors")
    with pytest.raises(MissingDataError, match="no such run folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no whole round"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="both say where"):
        load(earlier, "backbone.pretrained=true")


def test_a_hospital_never_reads_the_path_that_a_server_names(images, tmp_path):
    from client.site import resolve

    site = tmp_path / "site.yaml"
    site.write_text(f"name: own\nstate_dir: {tmp_path / 'state'}\noverrides: [data.index={images}]")
    (found,) = resolve({"site-config": str(site)}, "init=/secret/weights.safetensors")
    assert found.config.init is None
