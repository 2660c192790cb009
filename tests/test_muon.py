"""Muon: its orthogonal matrices, its step against one by singular value decomposition, and what it is used for."""

import pytest
import torch

import model
import muon
import train_classic
import training
from muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(1, 16, 144), (2, 64, 32), (1, 8, 8), (15, 20, 60)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    done = orthogonalise(x)
    assert done.shape == x.shape
    values = torch.linalg.svdvals(done)
    most = torch.linalg.svdvals(x) > 0.05 * torch.linalg.matrix_norm(x)[..., None]  # others need more iterations
    assert values.max() < 1.3 and values[most].min() > 0.6
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ done @ vh.mT  # diagonal, where the singular vectors are the same
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


def test_bfloat16_will_do():
    x = torch.randn(2, 64, 576, generator=torch.Generator().manual_seed(0))
    exact, rough = orthogonalise(x), orthogonalise(x.bfloat16())
    assert rough.dtype == torch.bfloat16 and (rough - exact).norm() / exact.norm() < 0.02
    weights = [torch.ones(64, 64, 3, 3).requires_grad_() for _ in range(2)]
    for weight, dtype in zip(weights, (torch.float32, torch.bfloat16), strict=True):
        weight.grad = x[0].view(64, 64, 3, 3).clone()
        Muon([weight], dtype=dtype).step()
    moved, expected = ((weight - 1).flatten() for weight in reversed(weights))
    assert 0 < (moved - expected).norm() / expected.norm() < 0.02 and not torch.equal(moved, expected)


def test_a_gradient_of_zeros_moves_nothing():
    assert not orthogonalise(torch.zeros(2, 4, 9)).any()


def nearest_orthogonal(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def test_steps_follow_the_formula(monkeypatch):
    """Two weights of one shape and one of another, three steps, against loops."""
    monkeypatch.setattr(muon, "orthogonalise", nearest_orthogonal)
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (8, 4, 3, 3), (4, 8, 1, 1)]
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    expected = [weight.detach().clone() for weight in weights]
    velocities = [torch.zeros_like(weight) for weight in expected]
    optimizer = Muon(weights, lr=0.1, momentum=0.8, weight_decay=0.5)
    for _ in range(3):
        for weight, wanted, velocity in zip(weights, expected, velocities, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            velocity.copy_(0.8 * velocity + 0.2 * weight.grad)
            ahead = (0.8 * velocity + 0.2 * weight.grad).flatten(1)
            step = 0.2 * max(ahead.shape) ** 0.5 * nearest_orthogonal(ahead).view(weight.shape)
            wanted.copy_(wanted * (1 - 0.1 * 0.5) - 0.1 * step)
        optimizer.step()
    assert all(torch.allclose(weight, wanted, atol=1e-5) for weight, wanted in zip(weights, expected, strict=True))


def test_weights_without_a_gradient_stay():
    weight = torch.ones(2, 2, 3, 3, requires_grad=True)
    Muon([weight]).step()
    assert torch.equal(weight, torch.ones(2, 2, 3, 3))


def test_it_has_the_hidden_convolutions_and_sgd_the_rest():
    net = model.build("resnet20", 4)
    head = train_classic.NormalisedSoftmax(5, net.dimension, 16.0)
    made = train_classic.make_optimizers(
        training.with_defaults(train_classic.Options(), lr=0.1, muon_lr=0.02), net, head
    )
    groups = {name: [p for group in each.param_groups for p in group["params"]] for name, each in made.items()}
    assert len(groups["muon"]) == 18 and all(weight.ndim == 4 for weight in groups["muon"])
    everything = {id(each) for each in [*net.parameters(), *head.parameters()]}
    assert {id(each) for each in groups["muon"] + groups["optimizer"]} == everything
    assert len(groups["muon"] + groups["optimizer"]) == len(everything)
