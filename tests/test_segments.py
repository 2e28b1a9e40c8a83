import pytest
import torch

from sparsecontrast.models.segments import segment_matrix, segment_means


@pytest.mark.parametrize(("n", "count"), [(12, 4), (13, 4), (15, 4), (7, 7), (3, 5), (1, 1), (100, 64)])
def test_means_of_even_runs_that_hold_every_token_once(n, count):
    x = torch.randn(2, 3, n, 5, dtype=torch.float64)
    runs = torch.tensor_split(x, min(count, n), dim=-2)
    wanted = torch.stack([run.mean(-2) for run in runs], dim=-2)
    torch.testing.assert_close(segment_means(x, count), wanted)
    matrix = segment_matrix(n, count)
    torch.testing.assert_close(matrix.double() @ x, wanted, rtol=1e-6, atol=1e-6)
    assert ((matrix > 0).sum(0) == 1).all() and torch.allclose(matrix.sum(1), torch.ones(min(count, n)))


def test_as_many_runs_as_tokens_are_the_tokens():
    x = torch.randn(2, 6, 4)
    assert torch.equal(segment_means(x, 6), x) and torch.equal(segment_matrix(6, 6), torch.eye(6))
