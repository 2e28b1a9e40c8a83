"""The benchmark of a deployment's costs: client processes train for real and say when."""

from benchmarks.deployment import starts
from simulation.deploy import TINY


def test_client_processes_train_and_their_times_are_in_order(tmp_path):
    cold, warm = starts(tmp_path / "start", TINY, 1)
    assert (cold["process"], warm["process"]) == ("cold", "warm")
    for row in (cold, warm):
        assert 0 < row["imports_s"] < row["torch_s"] < row["first_step_s"] < row["answer_s"]
        assert (
            row["modules"] > 1000
            and row["private_mib"] > 1
            and not {"sklearn", "opacus"} & set(row["not_spared"].split())
        )
    assert cold["imported"] > 1000 > 10 * warm["imported"]
    assert warm["template_mib"] > 0
