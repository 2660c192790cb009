"""triplet_loss and mine: wrong arguments, and what is said where the native op is missing."""

import pytest
import torch

import triplet
from contract import IMPLS, batch
from triplet import mine, triplet_loss


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_wrong_arguments_say_what_came(impl, device):
    x, labels = torch.randn(4, 3, device=device), torch.tensor([0, 0, 1, 1], device=device)
    for error, message, call in (
        (ValueError, r"\(B, D\).*got \(4,\)", lambda: triplet_loss(x[:, 0], labels, impl=impl)),
        (ValueError, r"got \(4, 0\)", lambda: triplet_loss(x[:, :0], labels, impl=impl)),
        (ValueError, r"got \(0, 3\)", lambda: triplet_loss(x[:0], labels[:0], impl=impl)),
        (
            ValueError,
            r"labels must be \(4,\), got \(4, 2\)",
            lambda: triplet_loss(x, labels[:, None].expand(4, 2), impl=impl),
        ),
        (TypeError, "int64", lambda: triplet_loss(x.long(), labels, impl=impl)),
        (TypeError, "got torch.float32", lambda: triplet_loss(x, labels.float(), impl=impl)),
        (TypeError, "got list", lambda: triplet_loss(x.tolist(), labels, impl=impl)),
        (
            ValueError,
            "distance must be one of.*'manhattan'",
            lambda: triplet_loss(x, labels, distance="manhattan", impl=impl),
        ),
        (ValueError, "mining must be one of", lambda: triplet_loss(x, labels, mining="easy", impl=impl)),
        (ValueError, "reduction must be one of", lambda: triplet_loss(x, labels, reduction="max", impl=impl)),
        (ValueError, "impl must be one of", lambda: triplet_loss(x, labels, impl="fast")),
        (ValueError, "temperature must be above 0, got 0", lambda: triplet_loss(x, labels, temperature=0, impl=impl)),
        (ValueError, "margin must be a number", lambda: triplet_loss(x, labels, float("nan"), impl=impl)),
        (ValueError, "got 2 and", lambda: triplet_loss(x, labels, others=(x[:, :2], labels), impl=impl)),
        (ValueError, "torch.float64", lambda: triplet_loss(x, labels, others=(x.double(), labels), impl=impl)),
        (ValueError, r"others\[1\] must be \(4,\)", lambda: triplet_loss(x, labels, others=(x, labels[:2]), impl=impl)),
        (TypeError, r"others must be a pair.*got 1 of them", lambda: triplet_loss(x, labels, others=(x,), impl=impl)),
        (TypeError, "got 3 of them", lambda: triplet_loss(x, labels, others=(x, labels, labels), impl=impl)),
        (TypeError, "others must be a pair.*got Tensor", lambda: triplet_loss(x, labels, others=x, impl=impl)),
        (ValueError, "one triplet for each anchor", lambda: mine(x, labels, mining="all", impl=impl)),
    ):
        with pytest.raises(error, match=message):
            call()


def test_without_the_native_op_auto_says_so_and_native_is_an_error(monkeypatch, caplog):
    monkeypatch.setattr(triplet, "native_library", lambda: "the native op is not built")
    triplet.decide_native.cache_clear()
    x, labels, _ = batch(8)
    with caplog.at_level("INFO", logger="triplet"):
        for _ in range(2):
            triplet_loss(x, labels)
    assert len(caplog.records) == 1 and "pip install -e ." in caplog.text
    with pytest.raises(RuntimeError, match=r"pip install -e \."):
        triplet_loss(x, labels, impl="native")
    triplet.decide_native.cache_clear()
