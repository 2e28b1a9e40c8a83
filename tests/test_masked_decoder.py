import pytest
import torch

from sparsecontrast.models import tokens
from sparsecontrast.models.linear_attention import ATTENTIONS
from sparsecontrast.models.masked_decoder import MaskedDecoder, sine_places


def decoder(attention="softmax", split=2, grid=(4, 4), depth=1):
    torch.manual_seed(0)
    return MaskedDecoder(6, grid, split, 9, 16, depth, 2, attention, 8)


def seen(n=2, patches=16, k=5):
    g = torch.Generator().manual_seed(0)
    visible = tokens.top_k(torch.rand(n, patches, generator=g), k)
    return torch.randn(n, k, 6, generator=g), visible, tokens.complement(visible, patches)


@pytest.mark.parametrize("attention", list(ATTENTIONS))
@pytest.mark.parametrize("split", [1, 2])
def test_every_hidden_token_is_predicted_and_every_weight_learns(attention, split):
    m = decoder(attention, split)
    found = m(*seen())
    assert found.shape == (2, 11 * split**2, 9)
    found.square().mean().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_a_hidden_token_is_told_by_its_place_alone():
    """Without attention a hidden token is a mask token at its place; so equal places are equal."""
    m = decoder()
    for block in m.blocks:
        torch.nn.init.zeros_(block.attn.attention.out.weight)
        torch.nn.init.zeros_(block.attn.attention.out.bias)
    x, visible, hidden = seen()
    visible[1], hidden[1] = visible[0], hidden[0]
    found = m(x, visible, hidden).detach()
    torch.testing.assert_close(found[0], found[1])
    assert len({round(float(v), 5) for v in found[0, :, 0]}) == found.shape[1]


def test_asking_for_visible_patches_gives_their_own_tokens():
    """What a visible patch's tokens are made of is that patch's encoder token, wherever it stands."""
    m = decoder(depth=0)
    x, visible, _ = seen()
    parts = m.embed(x).unflatten(2, (4, 16))
    places = m.places.view(16, 4, 16)[visible]
    torch.testing.assert_close(m(x, visible, visible), m.head(m.norm((parts + places).flatten(1, 2))))


def test_a_row_does_not_know_of_another():
    m = decoder("nystromformer")
    x, visible, hidden = seen()
    torch.testing.assert_close(m(x[1:], visible[1:], hidden[1:]), m(x, visible, hidden)[1:])


def test_places_follow_the_pixels_patch_by_patch():
    fine, plain = sine_places((2, 3), 2, 16), sine_places((4, 6), 1, 16)
    assert len(fine.unique(dim=0)) == len(fine) == 24
    order = tokens.cell_positions((4, 6), 2).flatten()  # where each part of each patch lies in the image
    assert torch.equal(fine, plain[order])
    square = sine_places((3, 3), 1, 16)
    assert torch.equal(square[0, :8], square[2, :8]) and torch.equal(square[0, 8:], square[6, 8:])


def test_places_and_nothing_else_are_left_out_of_the_state():
    m = decoder()
    assert "places" not in m.state_dict() and "mask_token" in m.state_dict()
