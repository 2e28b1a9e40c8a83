import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks import memory, sparsity, stopwatch
from benchmarks.contenders import OURS, Contender, Model, Workload, build_workload, random_batch
from sparsecontrast.config import compose

TOY = ("backbone.depth=2", "backbone.patch_size=4", "method.projection_hidden=32", "method.distill_every=4")
MODEL = Model("vit_tiny", 32, tuple((k, int(v)) for k, v in (word.split("=") for word in TOY)))
CPU = torch.device("cpu")


def clock_of(prices):
    """A clock that reads what each work costs from the work itself, and notes what ran."""
    ran = []

    def clock(work, count):
        name = work()
        ran.append(name)
        price = prices[name]() if callable(prices[name]) else prices[name]
        return price, 2 * price

    return clock, ran


def test_configs_without_hydra_are_those_of_hydra():
    told = compose(["backbone=vit_small", "backbone.img_size=384", "backbone.depth=3", "method.keep=0.4"])
    model = Model("vit_small", 384, (("backbone.depth", 3), ("method.keep", 0.4)))
    assert model.configs() == (told.backbone, told.method)


def test_nothing_of_hydra_flower_or_dicom_is_needed():
    code = (
        "import sys; import benchmarks.sparsity as s\n"
        "from benchmarks.contenders import Model; Model('vit_tiny', 224).configs()\n"
        "absent = {'hydra', 'omegaconf', 'flwr', 'opacus', 'pydicom', 'pandas', 'sklearn', 'rich'}\n"
        "print(sorted(absent & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ratios_cancel_a_drift_and_weigh_the_parts_by_share():
    slow = {"now": 1.0}

    def drift(price):
        def read():
            slow["now"] += 0.01
            return price * slow["now"]

        return read

    clock, _ = clock_of({"dense": drift(4.0), "half": drift(2.0), "rare": drift(12.0)})
    works = {
        "dense": [(1.0, lambda: "dense")],
        "half": [(1.0, lambda: "half")],
        "both": [(1.0, lambda: "rare"), (9.0, lambda: "half")],
    }
    times = stopwatch.interleave(works, ["dense"], clock, (6, 6), 0.0)
    assert {key: len(t.cost) for key, t in times.items()} == {"dense": 6, "half": 6, "both": 6}
    assert stopwatch.ratio(times["dense"], times["half"]).median == pytest.approx(2.0, rel=0.03)
    assert stopwatch.ratio(times["dense"], times["both"]).median == pytest.approx(4 / 3.0, rel=0.05)
    own = stopwatch.ratio(times["dense"], times["dense"])
    assert own == stopwatch.Ratio(1.0, 1.0, 1.0)
    assert times["half"].wall == pytest.approx([2 * c for c in times["half"].cost])


def test_references_run_between_repeats_and_rare_parts_rarely():
    clock, ran = clock_of({"dense": 1.0, "a": 1.0, "rare": 1.0, "often": 1.0})
    works = {
        "dense": [(1.0, lambda: "dense")],
        "a": [(1.0, lambda: "a")],
        "b": [(1.0, lambda: "rare"), (9.0, lambda: "often")],
    }
    stopwatch.interleave(works, ["dense"], clock, (6, 6), 0.0)
    measured = ran[2 * 4 :]  # each of four parts warms up twice
    places = [i for i, name in enumerate(measured) if name == "dense"]
    assert len(places) == 7 and places[0] == 0 and places[-1] == len(measured) - 1
    assert all({"a", "often"} <= set(measured[i:j]) for i, j in zip(places, places[1:], strict=False))
    assert measured.count("often") == 6 and measured.count("rare") == 2


def test_a_repeat_that_the_budget_does_not_hold_is_run_only_if_demanded():
    for budget, expected in ((0.0, 2), (1e9, 4)):
        clock, _ = clock_of({"dense": 1.0, "a": 2.0})
        works = {"dense": [(1.0, lambda: "dense")], "a": [(1.0, lambda: "a")]}
        assert len(stopwatch.interleave(works, ["dense"], clock, (2, 4), budget)["a"].cost) == expected


def test_every_contender_trains_and_infers():
    cell = sparsity.Cell(MODEL, "bf16", False)
    for contender in sparsity.contenders(cell, sparsity.Protocol(), CPU):
        work = build_workload(contender, MODEL, CPU)
        before = [p.clone() for p in work.module.parameters()]
        work.step(random_batch(32, 2, CPU, 0))
        after = list(work.module.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), contender
        embedding = work.infer(random_batch(32, 2, CPU, 0).first)
        width = 2 * 192 if contender.method == OURS else 192  # ours ends with the focus
        assert embedding.shape == (2, width) and embedding.isfinite().all() and not embedding.requires_grad


def test_ours_runs_at_the_share_told_in_training_and_in_inference():
    work = build_workload(Contender(OURS, 0.5), MODEL, CPU)
    seen = []
    work.module.backbone.vit.blocks[0].register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]))
    batch = random_batch(32, 2, CPU, 1)
    work.step(batch)
    work.infer(batch.first)
    assert set(seen) == {1 + 16 + 3 * 5} and work.cycle == 1


def test_only_a_teacher_makes_steps_differ():
    taught = Model(MODEL.backbone, MODEL.size, (*MODEL.changes, ("selection", "attention")))
    assert build_workload(Contender(OURS, 0.5), taught, CPU).cycle == 4


def test_saved_bytes_are_those_of_the_graph():
    linear = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, batch):
            return self.linear(batch.first.flatten(1)[:, :8].clone()).flatten()

    work = Workload(Toy(), "network", lambda _, x: x, lambda: None, 1, "fp32", CPU)
    # input [5, 8], GELU's input [5, 4] and output [5, 4]; no weight counts
    assert memory.step_saved(work, random_batch(8, 5, CPU, 0)) == 4 * 5 * (8 + 4 + 4)


def test_peak_memory_sees_what_a_step_needs():
    pixels = Model("vit_tiny", 64, MODEL.changes)
    few, many = (memory.training_memory(Contender("dense"), pixels, n, CPU) for n in (2, 32))
    ratio = many["saved_mib"] / few["saved_mib"]
    assert ratio == pytest.approx(16, rel=0.05)
    grown = many["peak_mib"] - few["peak_mib"]
    assert 0.8 < grown / (many["saved_mib"] - few["saved_mib"]) < 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole benchmark on a toy, once; what it wrote and the words it was given."""
    file = tmp_path_factory.mktemp("bench") / "toy.json"
    words = ["--quick", "--models", "tiny,no_such", "--sizes", "32", "--json", str(file), *TOY]
    sparsity.main(words)
    return file, words


def test_rows_are_whole_and_finite(run):
    file, _ = run
    result = json.loads(file.read_text())
    rows = result["rows"]
    assert result["name"] == "sparsity" and str(file.parent) not in result["command"]
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    phases = {(row["cell"], row["phase"]) for row in rows}
    assert phases == {(c, p) for c in ("fp32", "bf16", "int8") for p in sparsity.PHASES} - {("int8", "train")}
    methods = {row["method"] for row in rows}
    assert methods >= {"dense", OURS, "evit", "tome", "random_drop", "low_resolution", "all_coarse"}
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, int | float))
        for name in ("ratio_equal_precision", "ratio_stock_fp32"):
            assert 0 < row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        if row["phase"] == "train":
            assert row["saved_mib"] > 0 and row["peak_mib"] > 0 and row["saved_share_equal_precision"] > 0


def test_each_cell_has_its_references(run):
    rows = json.loads(run[0].read_text())["rows"]
    for cell in ("fp32", "bf16", "int8"):
        for phase in sparsity.PHASES[cell == "int8" :]:
            dense = [r for r in rows if (r["cell"], r["phase"], r["method"]) == (cell, phase, "dense")]
            equal = [r for r in dense if r["precision"] == cell]
            assert {r["attention"] for r in equal} == {"fused", "explicit"}
            assert [
                r["ratio_equal_precision"] for r in equal if r["attention"] == r["reference_attention"]
            ] == [1]
            stock = [r for r in dense if r["precision"] == "fp32" and r["attention"] == "fused"]
            assert [r["ratio_stock_fp32"] for r in stock] == [1]


def test_a_killed_run_goes_on_where_it_stood(run, tmp_path, monkeypatch, capsys):
    file, words = run
    result = json.loads(file.read_text())
    again = tmp_path / "toy.json"
    words = [str(again) if word == str(file) else word for word in words]
    kept = [row for row in result["rows"] if row["cell"] == "fp32"]
    partial = tmp_path / "toy.json.partial"
    partial.write_text(json.dumps(result | {"rows": kept}))
    asked = []
    row = result["rows"][-1]

    def measure(cell, *_):
        asked.append(cell.precision)
        return [row | {"cell": cell.precision}]

    monkeypatch.setattr(sparsity, "measure", measure)
    sparsity.main(words)
    assert asked == ["bf16", "int8"] and not partial.exists()
    assert json.loads(again.read_text())["rows"] == [*kept, row | {"cell": "bf16"}, row]
    assert "no_such: not built" in capsys.readouterr().out

    partial.write_text(json.dumps(result | {"rows": kept, "machine": {"cpu": "another"}}))
    sparsity.main(words)
    assert asked == ["bf16", "int8", "fp32", "bf16", "int8"]


def test_large_images_get_fewer_lines_on_a_cpu_only():
    cell = sparsity.Cell(Model("vit_small", 512), "fp32", False)
    on_cpu, on_gpu = (
        sparsity.contenders(cell, sparsity.Protocol(), torch.device(d)) for d in ("cpu", "cuda")
    )
    assert {c.keep for c in on_cpu if c.method == OURS} == {0.5, 0.25, 0.15}
    assert {c.keep for c in on_gpu if c.method == OURS} == set(sparsity.KEEPS)
    assert len(set(on_gpu)) == len(on_gpu) > len(on_cpu)


@pytest.mark.parametrize("method", [OURS, "dense", "all_coarse"])
def test_inference_in_bf16_is_that_of_weights_cast_once(method):
    work = build_workload(Contender(method, 0.5, "bf16"), MODEL, CPU)
    images = random_batch(32, 2, CPU, 0).first
    got = work.infer(images)
    network = getattr(work.frozen, work.network)
    assert {m.weight.dtype for m in network.modules() if type(m) is torch.nn.Linear} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in work.module.parameters())
    with torch.no_grad():
        exact = work.encode(work.module, images)
    assert not torch.equal(got, exact)
    torch.testing.assert_close(got.float(), exact, atol=0.05, rtol=0.05)


def test_a_resnets_reference_has_the_norms_of_ours_and_stock_timms_own():
    tiles = (("backbone.tiles", 7),)
    resnet, convnext = (Model(name, 224, tiles) for name in ("resnet18", "convnext_atto"))
    first, dense = sparsity.references(sparsity.Cell(resnet, "fp32", False), CPU)
    assert (first.method, dense) == ("stock", Contender("dense"))
    assert sparsity.references(sparsity.Cell(convnext, "fp32", False), CPU) == [Contender("dense")]

    def norms(contender):
        parts = build_workload(contender, resnet, CPU).module.modules()
        return {name for part in parts if "Norm2d" in (name := type(part).__name__) or name == "GroupNorm"}

    assert norms(first) == {"BatchNorm2d"}
    assert (
        norms(dense)
        == norms(Contender("low_resolution", 0.5))
        == norms(Contender(OURS, 0.5))
        == {"GroupNorm"}
    )


def test_stock_is_never_the_reference_at_equal_precision():
    cell = sparsity.Cell(Model("resnet18", 224, (("backbone.tiles", 7),)), "fp32", False)
    first, dense, ours = Contender("stock"), Contender("dense"), Contender(OURS, 0.25)
    times = {c: stopwatch.Times([s], [s]) for c, s in ((first, 1.0), (dense, 2.0), (ours, 0.5))}
    memory = {c: {"peak_mib": m} for c, m in ((first, 10.0), (dense, 20.0), (ours, 5.0))}
    row = sparsity.fold(cell, "train", 8, times, [first, dense], memory)[-1]
    assert (row["ratio_equal_precision"], row["ratio_stock_fp32"]) == (4, 2)
    assert (row["peak_share_equal_precision"], row["peak_share_stock_fp32"]) == (0.25, 0.5)
    assert (row["fine_cells"], row["cells"], row["token_share"]) == (12, 49, 12 / 49)
