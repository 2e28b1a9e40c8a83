"""An export computes what the run computes, or there is none."""

import hashlib
import re
import shutil
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from sparsecontrast import cli, export, export_onnx
from sparsecontrast.checkpoint import read_meta, read_round, round_file, write_round
from sparsecontrast.config import as_dict, compose
from sparsecontrast.errors import ConfigError, ExportError, MethodError, StorageError
from sparsecontrast.export import check_images, export_run
from sparsecontrast.features import load_method
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Choice
from sparsecontrast.models import tokens
from sparsecontrast.runs import read_run
from tests.exported import fresh_images, onnx_outputs, record
from tests.tiny import make_run

SHAPE = ("backbone.img_size=64", "backbone.patch_size=8", "backbone.depth=2", "federation.rounds=1")
SMALL = ("data.phantom.sites=2", "data.phantom.patients_per_site=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("export") / "run", *SHAPE, *SMALL)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The folder that ``sparsecontrast export --int8`` makes."""
    out = tmp_path_factory.mktemp("out") / "made" / "export"
    assert cli.main(["export", str(trained), "--out", str(out), "--int8"]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def method(trained):
    return load_method(read_run(trained).config, read_round(trained, 1).tensors)


def test_plain_timm_builds_the_run_from_the_files_alone(exported, method):
    plain = timm.create_model(**record(exported)["timm"]["build"]).eval()
    plain.load_state_dict(load_file(exported / "backbone.safetensors"))
    images = fresh_images(5)
    with torch.no_grad():
        # the second half of the run's embedding needs the scorer
        torch.testing.assert_close(plain(images), method.encode(images)[:, :192], atol=1e-5, rtol=0)
    assert (record(exported)["timm"]["embedding"], record(exported)["embedding"]) == (192, 384)
    assert method.encode(images).shape == (5, 384)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnxruntime_computes_what_torch_computes(exported, method, batch):
    images = fresh_images(batch)
    (dense,) = onnx_outputs(exported / "dense.onnx", images)
    sparse, kept = onnx_outputs(exported / "sparse.onnx", images)
    np.testing.assert_allclose(dense, method.encode(images, "dense"), atol=1e-4, rtol=0)
    np.testing.assert_allclose(sparse, method.encode(images, "sparse"), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(kept, method.choose(images, "sparse").kept)
    assert np.abs(sparse - dense).max() > 1e-3  # another function, not the dense graph twice


class Stripes:
    """A method of few distinct scores whose backbone is no ViT: it returns the cells' means."""

    def choose(self, images, keep):
        scores = (F.adaptive_avg_pool2d(images, (4, 4)) * 4).round().flatten(1)
        kept = tokens.top_k(scores, keep)
        return Choice(kept, scores.gather(1, kept).softmax(1))

    def backbone(self, images, kept, focus):
        cells = F.adaptive_avg_pool2d(images, (4, 4)).flatten(1)
        fine = cells.gather(1, kept)
        rest = cells.gather(1, tokens.complement(kept, 16))
        return torch.cat([fine, rest, (focus * fine).sum(1, keepdim=True)], 1)


def test_cells_of_equal_score_are_chosen_alike_and_any_backbone_goes_through(tmp_path):
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    method = Stripes()
    ties = (F.adaptive_avg_pool2d(images, (4, 4)) * 4).round().flatten(1)
    assert all(len(set(row)) <= 4 for row in ties.tolist())
    embedder, file = export_onnx.Embedder(method, 6).eval(), tmp_path / "stripes.onnx"
    export_onnx._write_graph(embedder, images, file)
    check = export_onnx._check(export_onnx._session(file), embedder, images, file.name)
    assert check["same_kept_cells"] and check["max_abs_difference"] < 1e-6


def test_eight_bits_are_near_and_not_the_same(exported, method):
    images = fresh_images(4)
    for name, keep in (("dense", "dense"), ("sparse", "sparse")):
        small = torch.from_numpy(onnx_outputs(exported / f"{name}.int8.onnx", images)[0])
        want = method.encode(images, keep)
        # 7-bit weights, 8-bit activations: about 1 % noise on a vector, of which the cosine sees the square
        assert torch.nn.functional.cosine_similarity(small, want).min() > 0.999
        assert not torch.equal(small, want)
        assert (exported / f"{name}.int8.onnx").stat().st_size < 0.5 * (
            exported / f"{name}.onnx"
        ).stat().st_size


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_the_scorer_stays_fp32_in_8_bits(exported, name):
    """Cells are chosen by its scores, and weighed by them: neither may turn on a rounding."""
    products = {"MatMul", "Gemm", "Conv"}
    before, after = (
        {n.name: n.op_type for n in onnx.load(exported / file).graph.node}
        for file in (f"{name}.onnx", f"{name}.int8.onnx")
    )
    scorer = {n for n, kind in before.items() if n.startswith(export_onnx.SCORER) and kind in products}
    assert len(scorer) > 3 and all(after.get(n) == before[n] for n in scorer)
    assert sum(kind == "MatMulInteger" for kind in after.values()) >= 8  # of the backbone: 4 in each block


def test_the_json_says_how_it_was_made_and_what_was_found(trained, exported, method):
    said = record(exported)
    files = {"backbone.safetensors", "dense.onnx", "sparse.onnx", "dense.int8.onnx", "sparse.int8.onnx"}
    assert set(said["sha256"]) == files == {p.name for p in exported.iterdir()} - {"export.json"}
    for name, digest in said["sha256"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert (
        said["round"] == 1
        and said["round_sha256"] == read_meta(trained, 1)["files"]["round_0001.safetensors"]
    )
    assert said["timm"]["check"]["max_abs_difference"] <= 1e-5
    checks = said["onnx"]["checks"]
    assert checks["sparse.onnx"]["same_kept_cells"] and checks["sparse.onnx"]["max_abs_difference"] <= 1e-4
    assert 0.99 < checks["sparse.int8.onnx"]["min_cosine"] < 1
    assert {(r["file"], r["batch"]) for r in said["onnx"]["latency"]} == {
        (name, batch) for name in files - {"backbone.safetensors"} for batch in (1, 8)
    }
    assert said["keep"]["fine_cells"] == method.choose(fresh_images(1)).kept.shape[1]


def test_no_path_of_this_machine_leaves_with_the_files(trained, exported):
    for path in exported.iterdir():
        data = path.read_bytes()
        assert str(trained).encode() not in data, path.name
        assert not re.search(rb"/\w+\.py", data), path.name  # ".py" alone turns up among random weights


def test_the_input_is_described_as_it_is_made(exported):
    said, images = record(exported)["input"], check_images(64)
    assert list(images.shape[1:]) == said["shape"][1:] and len(images) == 8
    pixels = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    from sparsecontrast.data.transforms import evaluation_view

    view = evaluation_view((pixels[:, 0] * 255).round().to(torch.uint8), 64)
    torch.testing.assert_close(view, (pixels - pixels.mean()) / (pixels.std() + said["epsilon"]))


def test_timm_alone_needs_no_onnx_and_dense_makes_no_sparse_graph(trained, tmp_path, monkeypatch, capsys):
    export_run(trained, tmp_path / "dense", keep="dense", formats=["onnx"])
    assert sorted(p.name for p in (tmp_path / "dense").iterdir()) == ["dense.onnx", "export.json"]
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    export_run(trained, tmp_path / "timm", formats=["timm"])
    assert sorted(p.name for p in (tmp_path / "timm").iterdir()) == ["backbone.safetensors", "export.json"]
    assert cli.main(["export", str(trained), "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "sparsecontrast[export]"' in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "timm"]


def test_poisoned_weights_are_not_exported(run, tmp_path):
    poisoned = read_round(run, 1).tensors
    poisoned["backbone.vit.blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    write_round(run, 2, poisoned, {})
    with pytest.raises(ExportError, match="backbone.safetensors: .* differs from the run by nan"):
        export_run(run, tmp_path / "out", formats=["timm"])
    with pytest.raises(ExportError, match="dense.onnx: differs from torch by nan"):
        export_run(run, tmp_path / "out", formats=["onnx"])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_files_that_are_not_the_run_are_not_exported(trained, tmp_path, monkeypatch):
    def bent(path, tensors):
        return write(path, {n: t * 1.001 if n.endswith("fc1.weight") else t for n, t in tensors.items()})

    def short(path, tensors):
        return write(path, {n: t for n, t in tensors.items() if n != "pos_embed"})

    write = export.write_tensors
    for instead, said in ((bent, "differs from the run by"), (short, "does not take the weights")):
        monkeypatch.setattr(export, "write_tensors", instead)
        with pytest.raises(ExportError, match=said):
            export_run(trained, tmp_path / "out", formats=["timm"])
    assert not list(tmp_path.iterdir())


def test_a_graph_that_keeps_other_cells_or_is_broken_in_8_bits_is_not_exported(exported, method):
    """The checks themselves, on graphs of another network."""
    session = export_onnx._session(exported / "sparse.onnx")
    other = build_method(compose([*SHAPE, "seed=5"])).eval()
    images = check_images(64)
    with pytest.raises(ExportError, match="keeps other cells than torch"):
        export_onnx._check(session, export_onnx.Embedder(other, "sparse"), images, "sparse.onnx")
    session = export_onnx._session(exported / "dense.int8.onnx")
    with pytest.raises(ExportError, match="cosine to fp32"):
        export_onnx._check_int8(session, export_onnx.Embedder(other, "dense"), images, "dense.int8.onnx")


def test_nothing_is_left_of_an_export_that_was_stopped(trained, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_bytes", killed)
    assert cli.main(["export", str(trained), "--out", str(tmp_path / "out"), "--format", "timm"]) == 130
    assert not list(tmp_path.iterdir())


def test_a_used_folder_is_not_overwritten(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(StorageError, match="already there"):
            export_run(trained, out, formats=["timm"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_run(trained, tmp_path / "empty", formats=["timm"])
    assert (tmp_path / "empty" / "export.json").is_file()


@pytest.mark.parametrize(("words", "said"), [
    (["--format", "timm,coreml"], "error [config]: --format timm,coreml: must name some of timm, onnx"),
    (["--format", ""], "error [config]: --format"),
    (["--format", "timm", "--int8"], "error [config]: --int8 writes ONNX graphs"),
    (["--keep", "1.5"], "error [method]: keep=1.5: must be in [0.25, 1]"),
    (["--keep", "nan"], "error [method]: keep=nan"),
])  # fmt: skip
def test_what_cannot_be_exported_is_one_line_and_status_2(trained, tmp_path, capsys, words, said):
    assert cli.main(["export", str(trained), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_keep_that_is_no_number_is_refused(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(trained), "--out", str(tmp_path / "out"), "--keep", "half"])
    assert stopped.value.code == 2 and "--keep" in capsys.readouterr().err


def test_a_run_that_is_not_there_or_untrained_is_refused(run, tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error [data_missing]")
    for path in (round_file(run, 1), round_file(run, 1, ".json")):
        path.unlink()
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error [untrained]")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def tell(run, *words):
    """Have a run say that it was told more, and what that gave."""
    path = run / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    saved["overrides"] = [*words, *saved["overrides"]]
    now = as_dict(compose(saved["overrides"]))
    path.write_text(yaml.safe_dump(saved | {group: now[group] for group in ("method", "backbone")}))


@pytest.mark.parametrize("word", ["selection=random", "method.selection=random"])
@pytest.mark.parametrize("keep", ["sparse", "dense"])
def test_a_random_selection_has_no_graph(run, tmp_path, word, keep):
    tell(run, word)
    assert read_run(run).config.method.selection == "random"
    with pytest.raises(ConfigError, match="cannot be exported; use --format timm"):
        export_run(run, tmp_path / "out", keep=keep)
    said = export_run(run, tmp_path / "out", keep=keep, formats=["timm"])
    assert said["keep"]["selection"] == "random"


def test_without_focus_a_random_selection_has_a_dense_graph(run, tmp_path):
    tell(run, "selection=random", "method.focus=false")
    with pytest.raises(ConfigError, match="cannot be exported; use --keep dense"):
        export_run(run, tmp_path / "out")
    said = export_run(run, tmp_path / "out", keep="dense", formats=["onnx"])
    assert list(said["onnx"]["checks"]) == ["dense.onnx"] and said["embedding"] == 192


def test_a_dense_run_says_what_it_chooses_by_when_exported_sparse(run, tmp_path):
    tell(run, "selection=random", "method=dense_contrast")
    said = export_run(run, tmp_path / "out", keep=0.5, formats=["onnx"])
    assert (said["keep"]["selection"], said["keep"]["fine_cells"]) == ("centre", 5)
    assert said["onnx"]["checks"]["sparse.onnx"]["same_kept_cells"] and said["embedding"] == 192


def test_kept_is_what_encode_keeps(method):
    images = fresh_images(3)
    assert method.choose(images, "dense").kept is None and method.choose(images, 1.0).kept is None
    with torch.no_grad():
        embedding = method.backbone(images, *method.choose(images, 0.5))
    assert torch.equal(method.encode(images, 0.5), embedding)
    with pytest.raises(MethodError):
        method.choose(images, 0.1)
