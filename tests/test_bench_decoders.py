import json
import math

import pytest
import torch

from benchmarks import decoders
from benchmarks.decoders import Case, EagerAttention, bar, crossing, too_large
from benchmarks.memory import allocated_peak, saved_by
from sparsecontrast.models.linear_attention import SoftmaxAttention

CASE = Case("attention", "fp32", 1, 64, 16, 2)


def test_quick_measures_every_attention_and_writes_it_down(tmp_path, capsys):
    decoders.main(["--quick", "--json", str(tmp_path / "out.json"), "--dim", "16", "--heads", "2"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["command"] == "python -m benchmarks.decoders --quick --device cpu --dim 16 --heads 2"
    measured = [r for r in found["rows"] if "cost_ms" in r]
    keys = {(r["tokens"], r["name"]) for r in measured}
    assert len(keys) == len(measured) == 2 * len(decoders.NAMES)
    assert all(r["cost_ms"] > 0 and r["peak_mib"] > 0 and r["saved_mib"] > 0 for r in measured)
    for r in measured:
        assert r["x_fused_low"] <= r["x_fused"] <= r["x_fused_high"]
        if r["name"] == "fused":
            assert r["leaner_fused"] == r["saved_leaner_fused"] == 1
        if r["name"] == "eager" and r["tokens"] == 256:
            assert r["saved_leaner_fused"] < 0.7  # it keeps the matrix
    crossings = [r for r in found["rows"] if "break_even_of" in r]
    assert len(crossings) == 4 * 2
    assert "Break-even" in capsys.readouterr().out


@pytest.mark.parametrize("name", decoders.NAMES)
def test_a_step_in_bf16_computes_in_it_and_leaves_gradients(name):
    case = Case("block", "bf16", 2, 64, 16, 2)
    step = decoders.build_step(case, name, "cpu")
    step()
    module, x = decoders._build(case, name, "cpu")
    exact = module(x)
    found = decoders._forward(module, x, case)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0.05)


def test_the_peak_of_a_step_is_that_of_its_tensors():
    x = torch.randn(2**18)  # 1 MiB

    def step():
        y = x * 2
        z = y + 1
        del y
        return float((z + z).sum())

    assert 2 <= allocated_peak(step) < 2.01


def test_eager_attention_is_the_fused_one():
    torch.manual_seed(0)
    fused, eager = SoftmaxAttention(16, 2), EagerAttention(16, 2)
    eager.load_state_dict(fused.state_dict())
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(eager(x), fused(x))


def test_saved_bytes_grow_with_the_square_of_the_tokens_for_eager_alone():
    def saved(name, tokens):
        case = Case("attention", "fp32", 1, tokens, 16, 2)
        module, x = decoders._build(case, name, "cpu")
        return saved_by(lambda: module(x), module)[0]

    for name in decoders.NAMES:
        growth = saved(name, 2048) / saved(name, 1024)
        assert (3 < growth < 4.1) if name == "eager" else (growth < 2.1), name


def test_eager_is_skipped_with_its_reason_where_it_would_fill_the_memory():
    large = Case("attention", "fp32", 1, 12544, 128, 4)
    assert too_large(CASE) is None and "7.0 GiB, more than 3" in (too_large(large) or "")


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [
        ((0.5, 2.0, 8.0), (100, 400, 200)),
        ((0.25, 0.5, 2.0), (400, 1600, 800)),
        ((2.0, 0.5, 2.0), (400, 1600, 800)),  # for good: not where it passes 1 the first time
        ((2.0, 3.0, 8.0), (None, 100, None)),
        ((0.2, 0.5, 0.9), (1600, None, None)),
    ],
)
def test_a_break_even_lies_between_what_was_measured(ratios, wanted):
    found = crossing(list(zip((100, 400, 1600), ratios, strict=True)))
    assert (found["after"], found["before"], found["tokens"]) == wanted


def test_the_bar_asks_for_speed_and_memory_each():
    row = {"part": "block", "precision": "fp32", "batch": 1, "tokens": 3136, "name": "linformer"}
    rows = [row | {"x_fused": 6.0, "leaner_fused": 2.0}, row | {"x_fused": 4.9, "leaner_fused": 4.0},
            row | {"tokens": 784, "x_fused": 1.0, "leaner_fused": 1.0},
            row | {"name": "eager", "skipped": "too large"}]  # fmt: skip
    assert [(r["faster"], r["leaner"]) for r in bar(rows)] == [("yes", "no"), ("no", "yes")]
    assert math.isclose(next(bar(rows))["x fused"], 6.0)
