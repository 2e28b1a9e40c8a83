import pytest

from sparsecontrast.errors import MethodError
from sparsecontrast.methods.word_budget import WordBudget


def budget(**changes) -> WordBudget:
    told = {"ceiling": 40, "floor": 20, "tolerance": 0.02, "every": 1, "factor": 0.8, "smoothing": 0.0}
    return WordBudget(**{**told, **changes})


def ks(one: WordBudget, losses: list[float]) -> list[int]:
    return [one.observe(loss) for loss in losses]


def test_k_stays_while_the_loss_falls():
    assert ks(budget(), [1.0, 0.9, 0.8, 0.7]) == [40, 40, 40, 40]


def test_k_shrinks_step_by_step_once_the_loss_is_flat_and_stops_at_the_floor():
    one = budget()
    assert ks(one, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == [40, 32, 25, 20, 20, 20]
    assert [row["change"] for row in one.trajectory] == ["learning", *["shrink"] * 5]


def test_k_grows_back_when_fewer_words_cost_loss_but_never_above_the_ceiling():
    one = budget()
    ks(one, [1.0, 1.0, 1.0])
    assert one.k == 25
    assert ks(one, [1.1, 1.1, 1.1, 1.1]) == [32, 40, 40, 40]
    assert one.trajectory[-1]["change"] == "grow"


def test_a_loss_within_the_tolerance_is_no_rise():
    assert ks(budget(), [1.0, 1.019])[-1] == 32
    assert ks(budget(), [1.0, 1.0, 1.021])[-1] == 40


def test_a_slow_rise_is_measured_from_the_best_not_from_the_last():
    """1 % an epoch is no change from one to the next; after three the best is more than 2 % away."""
    assert ks(budget(), [1.0, 1.01, 1.02, 1.03]) == [40, 32, 25, 32]


def test_between_two_looks_nothing_changes():
    assert ks(budget(every=3), [1.0] * 7) == [40, 40, 40, 40, 40, 32, 32]


def test_smoothing_keeps_one_bad_epoch_from_moving_k():
    rough, smooth = budget(), budget(smoothing=0.9)
    losses = [1.0, 1.0, 1.15]
    assert ks(rough, losses)[-1] == 40  # shrank, then grew back at once
    assert ks(smooth, losses)[-1] == 25  # 1.015 smoothed: no rise
    assert smooth.trajectory[-1]["smoothed"] == pytest.approx(1.015)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused_and_moves_nothing(loss):
    one = budget()
    ks(one, [1.0, 1.0])
    before = one.k
    with pytest.raises(MethodError, match=r"lower train\.lr"):
        one.observe(loss)
    assert one.k == before and len(one.trajectory) == 2
    assert one.observe(0.9) == before  # what came before still counts: the loss is falling


def test_the_trajectory_tells_every_epoch_with_the_k_it_was_trained_with():
    one = budget()
    ks(one, [1.0, 1.0, 1.0])
    assert [(row["epoch"], row["k"]) for row in one.trajectory] == [(1, 40), (2, 40), (3, 32)]
    assert all(row["held_out_loss"] == 1.0 for row in one.trajectory)
