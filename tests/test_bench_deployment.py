"""The benchmark of a deployment's costs: a fresh client process trains for real and says when."""

from benchmarks.deployment import starts
from simulation.deploy import TINY


def test_a_fresh_client_process_trains_and_its_times_are_in_order(tmp_path):
    (row,) = starts(tmp_path / "start", TINY, 1)
    assert 0 < row["imports_s"] < row["torch_s"] < row["first_step_s"] < row["answer_s"]
    assert row["modules"] > 1000 and not {"sklearn", "opacus"} & set(row["not_spared"].split())
