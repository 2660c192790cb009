"""Thresholds and probabilities of metrics.py against scikit-learn and against trying every threshold."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import cli
import metrics
import oneshot


def pairs(seed=0, images=150, classes=6, spread=1.0):
    """Normalised rows, labels, and of each pair i < j its similarity and "same class"."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    x = spread * torch.randn(images, 6, generator=generator) + torch.randn(classes, 6, generator=generator)[labels]
    z = torch.nn.functional.normalize(x)
    i, j = torch.triu_indices(images, images, 1)
    return z, labels, (z @ z.T)[i, j].numpy().astype(float), (labels[i] == labels[j]).numpy()


def calibrate(z, labels, criterion="balanced"):
    return metrics.calibrate(metrics.roc(z, labels), z, labels, [criterion])[criterion]


def errors(similarity, same, threshold):
    return 100 * (similarity[~same] > threshold).mean(), 100 * (similarity[same] <= threshold).mean()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["balanced", "eer", "far:0.1", "far:0.01"])
def test_thresholds_by_trying_all(criterion):
    z, labels, similarity, same = pairs()
    found = calibrate(z, labels, criterion)
    assert found["criterion"] == criterion and found["mode"] == "auto"
    assert found["calibrated_on"] == "150 held-back training images of 6 seen classes"
    accept, reject = errors(similarity, same, found["value"])
    assert (found["false_accept"], found["false_reject"]) == pytest.approx((accept, reject), abs=1e-9)
    values = np.sort(similarity)
    tried = np.array([errors(similarity, same, t) for t in (values[1:] + values[:-1]) / 2])
    if criterion == "balanced":
        assert accept + reject == pytest.approx(tried.sum(1).min(), abs=0.02)
    elif criterion == "eer":
        assert abs(accept - reject) <= np.abs(tried[:, 0] - tried[:, 1]).min() + 0.2
    else:
        rate = 100 * float(criterion[4:])
        assert accept <= rate and reject == pytest.approx(tried[tried[:, 0] <= rate, 1].min(), abs=1e-9)


def test_a_false_accept_rate_that_no_threshold_reaches():
    z = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]])
    found = calibrate(z, torch.tensor([0, 0, 1, 1]), "far:0.01")
    assert (found["value"], found["false_accept"], found["false_reject"]) == (1.0, 0.0, 100.0)


def test_false_accept_rates_are_exact():
    """One pair in twenty is not more than far:0.05 allows."""
    curve = metrics.roc(torch.nn.functional.normalize(torch.randn(9, 3)), torch.tensor([0] * 4 + [1] * 5))
    assert set(curve.false_accept.tolist()) <= {accepted / 20 for accepted in range(21)}


def probability(similarity, logistic):
    return oneshot.probabilities(np.array([[similarity]]), logistic, 1).item()


def test_the_logistic_is_scikit_learns():
    z, labels, similarity, same = pairs(images=400)
    slope, intercept = calibrate(z, labels)["logistic"]
    reference = LogisticRegression(C=1e9, class_weight="balanced", tol=1e-8).fit(similarity[:, None], same)
    assert slope == pytest.approx(reference.coef_[0, 0], rel=0.01)
    assert intercept == pytest.approx(reference.intercept_[0], rel=0.01)
    for value in (-0.5, 0.0, 0.4, 0.9):
        expected = reference.predict_proba([[value]])[0, 1]
        assert probability(value, [slope, intercept]) == pytest.approx(expected, abs=2e-3)


def test_separable_pairs_have_finite_probabilities():
    z, labels, similarity, same = pairs(spread=0.01)
    slope, intercept = calibrate(z, labels)["logistic"]
    assert np.isfinite([slope, intercept]).all()
    assert probability(similarity[same].min(), [slope, intercept]) > 0.9
    assert probability(similarity[~same].max(), [slope, intercept]) < 0.5
    assert probability(-1.0, [2000.0, -1900.0]) < 1e-300  # exp(3900) is beyond any float


def test_several_criteria_share_one_logistic():
    z, labels, _, _ = pairs()
    found = metrics.calibrate(metrics.roc(z, labels), z, labels, ["balanced", "far:0.1"])
    assert list(found) == ["balanced", "far:0.1"] and found["balanced"]["logistic"] == found["far:0.1"]["logistic"]
    assert found["far:0.1"] == calibrate(z, labels, "far:0.1")


def test_criteria():
    for criterion in ("balanced", "eer", "far:0.5", "far:1e-3"):
        cli.check_criterion(criterion)
    for criterion in ("", "far", "far:", "far:0", "far:1", "far:x", "0.01", "best"):
        with pytest.raises(ValueError, match="--criterion must be balanced, eer, or far:RATE"):
            cli.check_criterion(criterion)
