"""A CNN leaves as a ViT does: plain timm loads its network, onnxruntime computes the whole of it."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from sparsecontrast import cli, export
from sparsecontrast.checkpoint import read_round
from sparsecontrast.config import compose
from sparsecontrast.errors import ExportError, MethodError
from sparsecontrast.export import check_images, export_run
from sparsecontrast.features import load_method
from sparsecontrast.models.sparse_cnn import build_sparse_cnn
from sparsecontrast.pretrain import pretrain
from sparsecontrast.runs import read_run
from sparsecontrast.settings import BackboneConfig
from tests.exported import fresh_images, onnx_outputs, record

NAMES = ("convnext_atto", "resnet18")
SMALL = (
    "backbone.img_size=64", "backbone.tiles=2", "federation.rounds=1", "train.batch_size=8",
    "data.phantom.sites=2", "data.phantom.patients_per_site=8", "method.projection_hidden=32",
)  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return pretrain(compose([f"backbone={request.param}", f"output_dir={folder}", *SMALL]), show=False)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "export"
    assert cli.main(["export", str(trained), "--out", str(out), "--keep", "0.5"]) == 0
    return out


@pytest.fixture(scope="module")
def method(trained):
    return load_method(read_run(trained).config, read_round(trained, 1).tensors)


def close(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


@torch.no_grad()
def test_plain_timm_builds_the_network_inside_from_the_files_alone(exported, method):
    said, images = record(exported), fresh_images(3)
    plain: Any = timm.create_model(**said["timm"]["build"]).eval()
    plain.load_state_dict(load_file(exported / "backbone.safetensors"), strict=True)
    cnn, norm = method.backbone.cnn, method.backbone.norm
    close(cnn.forward_features(images), plain.forward_features(images), 1e-5)  # small maps: other rounding
    mean = cnn.forward_features(images).mean((2, 3))
    convnext = said["timm"]["build"]["model_name"].startswith("convnext")
    close(plain(images), norm(mean) if convnext else mean, 1e-5)
    assert plain(images).shape == (3, said["timm"]["embedding"])
    assert "without the overview" in said["timm"]["features"]


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_computes_what_torch_computes(exported, method, batch):
    images, found = fresh_images(batch), {}
    for name in ("dense", "sparse"):
        found[name] = onnx_outputs(exported / f"{name}.onnx", images)
    (dense,), (sparse, kept) = found["dense"], found["sparse"]
    np.testing.assert_allclose(dense, method.encode(images, "dense"), atol=1e-4, rtol=0)
    np.testing.assert_allclose(sparse, method.encode(images, 0.5), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(kept, method.choose(images, 0.5).kept)
    assert kept.shape == (batch, 2) and np.abs(sparse - dense).max() > 1e-3


def test_the_json_says_what_was_found(exported):
    said = record(exported)
    assert said["timm"]["check"]["max_abs_difference"] <= 1e-5
    checks = said["onnx"]["checks"]
    assert set(checks) == {"dense.onnx", "sparse.onnx"} and checks["sparse.onnx"]["same_kept_cells"]
    timed = {(row["file"], row["batch"]) for row in said["onnx"]["latency"]}
    assert timed == {(file, batch) for file in checks for batch in (1, 8)}
    assert said["keep"] == {
        "asked": 0.5, "selection": "surprise", "grid": [2, 2],
        "cell_in_pixels": 32, "cells": 4, "fine_cells": 2,
    }  # fmt: skip


def test_a_keep_out_of_range_is_refused(trained, tmp_path):
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(MethodError, match="share of the tiles"):
            export_run(trained, tmp_path / "out", keep=keep)
    assert not list(tmp_path.iterdir())


def test_poisoned_weights_are_not_exported(trained, tmp_path):
    poisoned = read_round(trained, 1).tensors
    next(t for name, t in poisoned.items() if name.startswith("backbone.cnn."))[0] = float("nan")
    config = read_run(trained).config
    with pytest.raises(ExportError, match="differs from the run by nan"):
        export._write_timm(load_method(config, poisoned), config.backbone, tmp_path, check_images(64))


class OneBackbone:
    """As much of a method as the timm weights need."""

    def __init__(self, config):
        torch.manual_seed(0)
        self.backbone = build_sparse_cnn(config).eval()
        with torch.no_grad():
            for p in self.backbone.parameters():  # fresh branches are closed, fresh norms are the identity
                p.add_(torch.randn(p.shape), alpha=0.02)


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_tiny", "resnet18", "resnet50_gn"])
def test_plain_timm_takes_every_network(name, tmp_path):
    config = BackboneConfig(name, 64, False, tiles=2)
    said = export._write_timm(OneBackbone(config), config, tmp_path, check_images(64))
    assert said["check"]["max_abs_difference"] <= 1e-5
    assert timm.create_model(**said["build"]).num_features == said["embedding"]
