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


def some(asked, attention="softmax", depth=1):
    torch.manual_seed(0)
    return MaskedDecoder(6, (4, 4), 2, 9, 16, depth, 2, attention, 4, (5, asked))


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_a_part_is_predicted_with_no_token_of_the_others(attention):
    m, counts = some(3, attention), []
    m.blocks.register_forward_hook(lambda module, given, out: counts.append(out.shape[1]))
    x, visible, hidden = seen()
    found = m(x, visible, hidden[:, 2:5])
    assert found.shape == (2, 3 * 4, 9) and counts == [5 + 3 * 4]
    found.square().mean().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    torch.testing.assert_close(m(x[1:], visible[1:], hidden[1:, 2:5]), found[1:])


@pytest.mark.parametrize("asked", [1, 3, 4, 11])
def test_all_hidden_patches_are_predicted_part_by_part(asked):
    """Where parts do not divide the eleven that are hidden, the last begins earlier; none is told twice."""
    m = some(asked)
    x, visible, hidden = seen()
    found = m(x, visible, hidden)
    assert found.shape == (2, 11 * 4, 9)
    for start in range(0, 11, asked):
        at = min(start, 11 - asked)
        part = m(x, visible, hidden[:, at : at + asked])[:, (start - at) * 4 :]
        torch.testing.assert_close(found[:, start * 4 : (start + asked) * 4], part)


def test_a_visible_patch_stands_in_the_middle_of_its_parts():
    middles, fine = sine_places((3, 4), 1, 16, 2), sine_places((3, 4), 2, 16).view(12, 4, 16)
    slowest = [3, 7, 11, 15]  # sine and cosine of the longest wave, all but straight within a patch
    torch.testing.assert_close(middles[:, slowest], fine[:, :, slowest].mean(1), atol=1e-4, rtol=0)
    assert len(torch.cat([middles, fine.flatten(0, 1)]).unique(dim=0)) == 12 * 5
