"""A trained method as ONNX graphs with a free batch, checked and timed in onnxruntime.

The sparse graph is one file: image -> saliency -> exclusion -> top-k -> gather -> sparse
backbone -> embedding. It asks a method for ``choose`` and ``backbone`` alone, so any backbone with
``forward(images, kept, focus)`` goes through.
"""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsecontrast.errors import ConfigError, ExportError

OPSET = 18  # what the exporter itself speaks, and old enough for most runtimes
TOLERANCE = 1e-4  # fp32 in another order of summation, onnxruntime against torch
MIN_COSINE = 0.9  # an embedding in 8 bits below this is broken, not coarse
BATCHES = (1, 8)  # that are timed
REPEATS = 9
SCORER = "method.saliency"  # opens the names of its nodes, which stay fp32


class Embedder(nn.Module):
    """What a graph computes: images [B, 1, H, W] -> embedding [B, D], and kept cells [B, m] where sparse."""

    def __init__(self, method: Any, keep: str | float):
        super().__init__()
        self.method = method
        self.keep = keep

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the embedding, with the kept cells unless all are kept."""
        kept, focus = self.method.choose(images, self.keep)
        embedding = self.method.backbone(images, kept, focus)
        return embedding if kept is None else (embedding, kept)


def require_onnx() -> None:
    """Import what an export needs.

    Raises:
        ConfigError: a package is missing; says how to install it.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'--format onnx: {error.name} is not installed: pip install "sparsecontrast[export]", '
            "or ask for --format timm"
        ) from error


def write_graphs(
    method: Any, keep: str | float, folder: Path, images: Tensor, int8: bool = False
) -> dict[str, Any]:
    """Write ``dense.onnx``, ``sparse.onnx`` unless all cells are kept, and ``*.int8.onnx`` on demand.

    Args:
        method: in evaluation mode, on the CPU.
        keep: of the sparse graph, as in ``encode``.
        folder: where the files go.
        images: normalised [N, 1, H, W], N > 1, to check with.
        int8: write dynamically quantised graphs beside the others.

    Returns:
        ``checks``, what was found for each file, and ``latency``, rows of file, batch and
        milliseconds per image on one thread.

    Raises:
        ExportError: torch cannot export the method, or a graph does not compute what the method does.
    """
    sparse = method.choose(images, keep).kept is not None
    checks, sessions = {}, {}
    for name, share in (("dense", "dense"), ("sparse", keep))[: 1 + sparse]:
        embedder = Embedder(method, share).eval()
        file = folder / f"{name}.onnx"
        _write_graph(embedder, images, file)
        sessions[file.name] = _session(file)
        checks[file.name] = _check(sessions[file.name], embedder, images, file.name)
        if int8:
            small = folder / f"{name}.int8.onnx"
            _quantise(file, small)
            sessions[small.name] = _session(small)
            checks[small.name] = _check_int8(sessions[small.name], embedder, images, small.name)
    return {"opset": OPSET, "checks": checks, "latency": _latency(sessions, images)}


def _write_graph(embedder: Embedder, images: Tensor, file: Path) -> None:
    """Export by ``torch.export``: the older exporter is deprecated and warns."""
    with warnings.catch_warnings(), torch.no_grad():
        # torch warns of its own deprecated class whenever it copies a signature
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
        try:
            program = torch.onnx.export(
                embedder, (images[:2],), dynamo=True, verbose=False, opset_version=OPSET,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                input_names=["images"], output_names=_outputs(embedder, images),
                custom_translation_table=_translations(),
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ExportError(f"{file.name}: torch cannot export this method to ONNX: {reason}") from error
    assert program is not None  # dynamo=True returns one
    for graph in (program.model.graph, *(f.graph for f in program.model.functions.values())):
        for node in graph.all_nodes():
            if SCORER in node.metadata_props.get("pkg.torch.onnx.name_scopes", ""):
                node.name = f"{SCORER}.{node.name}"
            node.metadata_props.clear()  # stack traces: they hold the paths of this machine
    program.save(file)


def _outputs(embedder: Embedder, images: Tensor) -> list[str]:
    sparse = embedder.method.choose(images[:1], embedder.keep).kept is not None
    return ["embedding", "kept"] if sparse else ["embedding"]


def _translations() -> dict[Any, Any]:
    """The operation that torch's exporter does not know, in ONNX."""
    from onnxscript import opset18

    op: Any = opset18  # its annotations let no operation take another's result

    def stable_sort(x, stable=None, dim: int = -1, descending: bool = False):
        # equal values leave TopK with the lower index first: the specification says so, hence stable
        length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        if x.dtype.is_integer():
            x = op.Cast(x, to=7)  # onnxruntime's TopK knows int64, no smaller integers than int32
        return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: stable_sort}


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _quantise(source: Path, target: Path) -> None:
    """Weights of the matrix products to 8 bits for each output channel; activations at each call.

    Convolutions and the whole scorer, which chooses the cells, stay fp32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(str(source))
    add_pre_process_metadata(
        model
    )  # torch's exporter has inferred the shapes: spares a log line that asks for it
    quantize_dynamic(
        model, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
        reduce_range=True,  # 7 of the 8 bits: a CPU without VNNI would overflow
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[node.name for node in model.graph.node if node.name.startswith(SCORER)],
    )  # fmt: skip


def _run(session: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    embedding, *kept = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(embedding), torch.from_numpy(kept[0]) if kept else None


def _pairs(session: Any, embedder: Embedder, images: Tensor, name: str) -> list[tuple[Tensor, Tensor]]:
    """Embeddings of a graph and of torch for all images at once, then for each alone.

    Raises:
        ExportError: they keep other cells.
    """
    pairs = []
    for batch in (images, *images.split(1)):
        with torch.no_grad():
            want = embedder(batch)
        want, want_kept = want if isinstance(want, tuple) else (want, None)
        got, kept = _run(session, batch)
        if want_kept is not None and not (kept is not None and torch.equal(kept, want_kept)):
            raise ExportError(
                f"{name}: in a batch of {len(batch)} it keeps other cells than torch; not exported"
            )
        pairs.append((got, want))
    return pairs


def _check(session: Any, embedder: Embedder, images: Tensor, name: str) -> dict[str, Any]:
    pairs = _pairs(session, embedder, images, name)
    differences = [float((got - want).abs().max()) for got, want in pairs]
    worst = float(np.max(differences))  # not max(): that may pass over a not-a-number
    if not worst <= TOLERANCE:
        raise ExportError(f"{name}: differs from torch by {worst:g}, allowed {TOLERANCE:g}; not exported")
    return {
        "against": "torch", "images": len(images), "batches": [1, len(images)],
        "max_abs_difference": worst, "tolerance": TOLERANCE, **_same_cells(embedder, images),
    }  # fmt: skip


def _check_int8(session: Any, embedder: Embedder, images: Tensor, name: str) -> dict[str, Any]:
    got, want = _pairs(session, embedder, images, name)[0]
    cosine = torch.nn.functional.cosine_similarity(got, want)
    if not float(cosine.min()) >= MIN_COSINE:
        raise ExportError(f"{name}: cosine to fp32 {float(cosine.min()):g}, below {MIN_COSINE}; not exported")
    return {
        "against": "torch", "images": len(images), "batches": [1, len(images)],
        "min_cosine": float(cosine.min()), "mean_cosine": float(cosine.mean()),
        "max_abs_difference": float((got - want).abs().max()), **_same_cells(embedder, images),
    }  # fmt: skip


def _same_cells(embedder: Embedder, images: Tensor) -> dict[str, Any]:
    return {"same_kept_cells": True} if len(_outputs(embedder, images)) > 1 else {}


def _latency(sessions: dict[str, Any], images: Tensor) -> list[dict[str, Any]]:
    """Median milliseconds per image, one thread; the files take turns, so that a busy moment hits all."""
    rows = []
    for batch in BATCHES:
        given = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
        taken: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(REPEATS + 1):
            for name, session in sessions.items():
                start = time.perf_counter()
                _run(session, given)
                taken[name].append(time.perf_counter() - start)
        rows += [_row(name, batch, seconds[1:]) for name, seconds in taken.items()]  # the first warms up
    return rows


def _row(name: str, batch: int, seconds: Sequence[float]) -> dict[str, Any]:
    return {"file": name, "batch": batch, "ms_per_image": round(float(np.median(seconds)) / batch * 1e3, 3)}
