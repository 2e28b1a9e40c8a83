import dataclasses

import pytest
import torch
from torch import nn

from sparsecontrast.config import compose
from sparsecontrast.coupling import coupling, noise_batch
from sparsecontrast.methods import build_method
from tests.private import CNN, RESNET, VIT, Tiny, batch_of, library_method


@pytest.mark.parametrize("kind", [VIT, CNN, RESNET], ids=["vit", "cnn", "resnet"])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_patch_contrast_couples_nothing(kind, keep):
    method = library_method(kind, f"method.keep={keep}", "method.explore=0.25")
    assert method.per_sample and coupling(method, noise_batch(method, 2)) == 0
    method.eval()
    assert coupling(method, batch_of(method, [0, 0], "alike")) == 0


@pytest.mark.parametrize("selection", ["random", "centre", "energy"])
def test_no_selection_couples(selection):
    method = library_method(VIT, f"selection={selection}")
    assert coupling(method, noise_batch(method, 3)) == 0


@pytest.mark.parametrize("kind", [VIT, CNN], ids=["vit", "cnn"])
def test_contrast_over_the_batch_couples_as_its_flag_says(kind):
    method = build_method(compose([*kind, "method.projection_hidden=16"]))
    assert not method.per_sample and coupling(method, noise_batch(method, 3)) > 0


def test_batch_norm_couples_in_training_alone():
    method = Tiny()
    assert coupling(method, noise_batch(method, 3)) == 0
    method.backbone[1] = nn.BatchNorm2d(4)
    assert coupling(method, noise_batch(method, 3)) > 0
    assert coupling(method.eval(), noise_batch(method, 3)) == 0  # frozen, it is refused all the same


def test_a_coupling_through_one_view_alone_is_found():
    class Half(Tiny):
        def forward(self, batch):
            return super().forward(dataclasses.replace(batch, second=batch.second - batch.second.mean(0)))

    assert coupling(Half(), noise_batch(Half(), 3)) > 0


def test_it_leaves_no_gradient_behind():
    method = Tiny()
    batch = noise_batch(method, 2)
    coupling(method, batch)
    assert all(p.grad is None for p in method.parameters()) and not batch.first.requires_grad
    assert torch.equal(batch.first, noise_batch(method, 2).first)
