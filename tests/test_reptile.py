"""train_reptile.py's own parts: tasks, inner optimizers, meta-step."""

import pytest
import torch

import checkpoints
import data
import model
import train_reptile
from tiny import REPTILE


@pytest.mark.slow
def test_a_domain_is_one_class_against_all_others(train, tmp_path, monkeypatch):
    original = train_reptile.triplet_loss
    batches = []

    def recording(embeddings, labels, *args, others, **kwargs):
        assert len(embeddings) == len(labels) == 4 and others[0].requires_grad
        batches.append((labels, others[1]))
        return original(embeddings, labels, *args, others=others, **kwargs)

    monkeypatch.setattr(train_reptile, "triplet_loss", recording)
    out = train(train_reptile, [*REPTILE, "--rotate", "0", "--task", "domain", "--iters", "60"], tmp_path / "run")
    own = torch.stack([labels for labels, _ in batches])
    others = torch.stack([labels for _, labels in batches])
    assert own.shape == others.shape == (180, 4)
    assert (
        (own == own[:, :1]).all() and (own[:, :1] != others).all() and set(others.flatten().tolist()) == set(range(6))
    )
    tasks = own.view(60, 3, 4)
    assert (tasks == tasks[:, :1]).all() and set(own.flatten().tolist()) == set(range(6))
    assert checkpoints.read(out / "best.pt")["validation"]["triplet_accuracy"] > 80


@pytest.mark.slow
def test_the_classes_of_a_task_stay_upright_or_turned(train, tmp_path, monkeypatch):
    """Rotations are drawn for each task, not for each step; a rotated class is a class among the others."""
    original, turned = data.TrainingData.batch, []

    def recording(self, normalise, index, turns):
        if len(index) == 12:  # a step's, not those that batch norm is measured on
            turned.append(turns)
        return original(self, normalise, index, turns)

    monkeypatch.setattr(data.TrainingData, "batch", recording)
    train(train_reptile, [*REPTILE, "--rotate", "0.5", "--iters", "40"], tmp_path / "run")
    tasks = torch.stack(turned).view(40, 3, 3, 4)  # task, step, class, image
    assert (tasks == tasks[:, :1, :, :1]).all()
    upright = (tasks[:, 0, :, 0] == 0).float().mean()
    assert 0.35 < upright < 0.65 and set(tasks.flatten().tolist()) == {0, 1, 2, 3}


def test_the_inner_optimizers_of_reptile():
    net = model.build("resnet20", 4)
    muon, adam = train_reptile.make_optimizers(train_reptile.Options(lr=0.001, muon_lr=0.01, beta1=0.5), net)
    (hidden,), (rest,) = muon.param_groups, adam.param_groups
    assert (hidden["lr"], hidden["momentum"], rest["lr"], rest["betas"]) == (0.01, 0.5, 1e-3, (0.5, 0.999))
    assert {id(p) for p in hidden["params"] + rest["params"]} == {id(p) for p in net.parameters()}
    (adam,) = train_reptile.make_optimizers(train_reptile.Options(lr=0.001, optimizer="adam"), net)
    assert len(adam.param_groups[0]["params"]) == len(list(net.parameters()))


def test_meta_step_interpolates_towards_the_mean():
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    adapted = [[torch.tensor([2.0, 0.0]), torch.tensor([[5.0]])], [torch.tensor([4.0, 2.0]), torch.tensor([[3.0]])]]
    train_reptile.meta_step(weights, adapted, 0.5)
    assert weights[0].tolist() == [2.0, 1.5] and weights[1].tolist() == [[3.5]]


def test_reptile_keeps_its_weights_at_meta_step_size_0(train, tmp_path):
    """One iteration with an all but empty meta-step: parameters stay, though the inner steps moved the network."""
    out = train(train_reptile, REPTILE, tmp_path / "run", "--iters", "1", "--meta-step-size", "1e-30", "--lr", "0.1")
    torch.manual_seed(0)
    fresh = dict(model.build("resnet20", 4).named_parameters())
    saved = checkpoints.read(out / "last.pt")["model"]
    assert all(torch.allclose(saved[name], parameter, rtol=0, atol=1e-25) for name, parameter in fresh.items())


def test_each_task_starts_from_the_kept_weights(train, tmp_path, monkeypatch):
    starts, original = [], train_reptile.adapt

    def spy(run, *given):
        starts.append(torch.cat([parameter.detach().flatten() for parameter in run.net.parameters()]))
        return original(run, *given)

    monkeypatch.setattr(train_reptile, "adapt", spy)
    out = train(train_reptile, [*REPTILE, "--iters", "1", "--meta-batch", "3"], tmp_path / "run")
    assert len(starts) == 3 and all(torch.equal(start, starts[0]) for start in starts)
    assert checkpoints.read(out / "last.pt")["images"] == 3 * 3 * 3 * 4  # tasks, steps, classes, images of each
