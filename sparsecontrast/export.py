"""A run folder -> a folder that others can load: plain timm weights, ONNX graphs, one JSON.

    backbone.safetensors   the state dict of ``timm.create_model(**build)``
    dense.onnx             images -> embedding
    sparse.onnx            images -> embedding, kept cells; the selection is in the graph
    *.int8.onnx            the same in 8 bits
    export.json            how to build and feed them, hashes, what the checks found, latency

The folder is there whole, every file checked against the run, or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sparsecontrast.checkpoint import read_tensors, weights_sha256, write_tensors
from sparsecontrast.config import anchored
from sparsecontrast.durable import new_folder, write_bytes
from sparsecontrast.errors import ConfigError, ExportError
from sparsecontrast.export_onnx import require_onnx, write_graphs
from sparsecontrast.models.sparse_cnn import SparseCNN, timm_arguments
from sparsecontrast.models.sparse_vit import SparseViT
from sparsecontrast.settings import BackboneConfig, Config, MethodConfig, MiramConfig

VERSION = 1
FORMATS = ("timm", "onnx")
WEIGHTS = "backbone.safetensors"
RECORD = "export.json"
TOLERANCE = 1e-5  # the same network in the same library: rounding alone
PHANTOMS, NOISE = 6, 2  # images to check with: radiographs no hospital owns, and pure noise


def export_run(
    run_dir: str | Path, out: str | Path, keep: str | float | None = None,
    formats: Sequence[str] = FORMATS, int8: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Export the newest round of a run into the new folder ``out``.

    Args:
        run_dir: a run folder with at least one trained round; its data are not needed.
        out: not there, or empty.
        keep: of the sparse graph: ``sparse`` as the run was configured, a share of the tokens (of a
            CNN's tiles), or ``dense`` for none. None is ``sparse`` where the method chooses regions.
        formats: of ``FORMATS``.
        int8: write quantised ONNX graphs too.

    Returns:
        What ``export.json`` says.

    Raises:
        MissingDataError, UntrainedError: there is no trained run.
        ConfigError: an unknown format, a missing package, ``keep=auto``, a selection that cannot be exported.
        MethodError: ``keep`` is out of range.
        ExportError: a file does not compute what the run computes; nothing is left.
        StorageError: ``out`` is used already, or cannot be written.
    """
    from sparsecontrast.features import load_method, trained_round
    from sparsecontrast.runs import read_run

    _check_formats(formats, int8)
    if keep == "auto":
        raise ConfigError(
            "--keep auto: a graph keeps the same number of cells of every image, so it cannot choose a share "
            "for each; give a number, such as 0.5 (evaluation.json lists what each share risks)"
        )
    run = read_run(run_dir)
    found = trained_round(run)
    method = load_method(run.config, found.tensors)
    images = check_images(run.config.backbone.img_size)
    if keep is None:
        keep = "sparse" if isinstance(run.config.method, MethodConfig) else "dense"
    kept = method.choose(images, keep).kept
    if "onnx" in formats:
        _check_selection(run.config.method, kept)
    with new_folder(anchored(out)) as folder:
        record: dict[str, Any] = {
            "version": VERSION, "round": found.number, "round_sha256": weights_sha256(found.meta),
            "method": run.config.method.name, "input": _input(run.config),
            "embedding": method.embed_dim, "keep": _keep(run.config, method, keep, kept),
            "versions": _versions(formats),
        }  # fmt: skip
        if "timm" in formats:
            record["timm"] = _write_timm(method, run.config.backbone, folder, images)
        if "onnx" in formats:
            record["onnx"] = write_graphs(method, keep, folder, images, int8)
        record["sha256"] = {p.name: _sha256(p) for p in sorted(folder.iterdir())}
        write_bytes(folder / RECORD, json.dumps(record, indent=1, allow_nan=False).encode())
    return record


def check_images(size: int) -> Tensor:
    """Normalised images [8, 1, size, size], always the same: phantoms, then noise."""
    from sparsecontrast.data.phantom import render
    from sparsecontrast.data.transforms import evaluation_view

    films = [torch.from_numpy(render(0, i, i, 0, size).image) for i in range(PHANTOMS)]
    noise = torch.rand(NOISE, size, size, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([torch.stack(films).float(), noise])
    return evaluation_view((pixels * 255).round().to(torch.uint8), size)


def _check_formats(formats: Sequence[str], int8: bool) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(f"--format {','.join(formats)}: must name some of {', '.join(FORMATS)}")
    if "onnx" in formats:
        require_onnx()
    elif int8:
        raise ConfigError("--int8 writes ONNX graphs: add onnx to --format")


def _check_selection(config: MethodConfig | MiramConfig, kept: Tensor | None) -> None:
    if isinstance(config, MiramConfig):
        return
    # focus weighs all cells by the draw, so that not even the dense graph can do without it
    if config.selection == "random" and (config.focus or kept is not None):
        instead = "--format timm" if config.focus else "--keep dense"
        raise ConfigError(f"selection=random: torch's random draw cannot be exported; use {instead}")


def _write_timm(method: Any, config: BackboneConfig, folder: Path, images: Tensor) -> dict[str, Any]:
    """Write the weights, then build the model anew from what was written and compare."""
    inside = _timm_model(method.backbone, config)
    write_tensors(folder / WEIGHTS, inside.state)
    with torch.random.fork_rng(devices=[]):
        plain = timm.create_model(**json.loads(json.dumps(inside.build))).eval()
    try:
        plain.load_state_dict(read_tensors(folder / WEIGHTS))
    except RuntimeError as error:
        raise ExportError(f"{WEIGHTS}: plain timm does not take the weights: {error}") from error
    with torch.no_grad():
        difference = float((plain(images) - inside.features(images)).abs().max())
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{WEIGHTS}: rebuilt by plain timm it differs from the run by {difference:g}, "
            f"allowed {TOLERANCE:g}; not exported"
        )
    check = {"images": len(images), "max_abs_difference": difference, "tolerance": TOLERANCE}
    return {
        "build": inside.build,
        "weights": WEIGHTS,
        "embedding": method.backbone.embed_dim,
        "features": inside.meaning,
        "check": {"against": "the run, dense", **check},
    }


@dataclass(frozen=True)
class Inside:
    """The timm model inside a backbone.

    Attributes:
        build: arguments with which ``timm.create_model`` makes its like.
        state: its weights by timm's names.
        features: what the run itself computes with them, images [B, 1, H, W] -> [B, D].
        meaning: of the features, beside the run's embedding.
    """

    build: dict[str, Any]
    state: dict[str, Tensor]
    features: Callable[[Tensor], Tensor]
    meaning: str


def _timm_model(backbone: nn.Module, config: BackboneConfig) -> Inside:
    if isinstance(backbone, SparseCNN):
        meaning = "the network on the whole image, without the overview and the attention over cells"
        return Inside(timm_arguments(config), backbone.timm_state(), backbone.timm_features, meaning)
    if not isinstance(backbone, SparseViT):
        raise ExportError(f"{type(backbone).__name__}: no timm model can be taken from this backbone")
    build = {
        "model_name": config.name, "img_size": config.img_size, "patch_size": config.patch_size,
        "in_chans": 1, "num_classes": 0, "global_pool": config.pool,
        **({} if config.depth is None else {"depth": config.depth}),
    }  # fmt: skip
    meaning = "the dense embedding; with method.focus its first half, for the second needs the scorer"
    return Inside(build, backbone.vit.state_dict(), backbone, meaning)


def _input(config: Config) -> dict[str, Any]:
    """How an image becomes the input: ``data.transforms.evaluation_view`` in words and numbers."""
    from sparsecontrast.data.transforms import FLAT

    size = config.backbone.img_size
    return {
        "shape": ["batch", 1, size, size],
        "dtype": "float32",
        "resize": "bilinear, antialiased, of the grey image in [0, 1] with white bright",
        "normalisation": "each image by itself: (x - mean) / (std + epsilon), std with Bessel's correction",
        "epsilon": FLAT,
    }


def _keep(config: Config, method: Any, keep: str | float, kept: Tensor | None) -> dict[str, Any]:
    cells = method.backbone.num_cells
    fine = cells if kept is None else kept.shape[1]
    rows, columns = method.backbone.grid
    patches = {} if config.backbone.tiles else {"cell_in_patches": config.method.cell}
    selection = config.method.selection if isinstance(config.method, MethodConfig) else None
    return {
        "asked": keep, "selection": selection, "grid": [rows, columns],
        "cell_in_pixels": config.backbone.img_size // rows, **patches, "cells": cells, "fine_cells": fine,
    }  # fmt: skip


def _versions(formats: Sequence[str]) -> dict[str, str]:
    names = ["sparsecontrast", "torch", "timm", "safetensors"]
    names += ["onnx", "onnxruntime", "onnxscript"] if "onnx" in formats else []
    return {name: version(name) for name in names}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
