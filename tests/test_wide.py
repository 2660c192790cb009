"""The CPU kernels for 64-byte vectors, compiled for this machine, against the oracle and plain PyTorch.

The native op runs them where the processor has AVX-512 only; here they run everywhere, on more instructions.
"""

from pathlib import Path

import pytest
import torch

from contract import MININGS, TYPES, batch
from kernels import Case, compiled, hold_against_the_oracle, hold_against_torch, run
from triplet import DISTANCES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def wide():
    headers = Path(torch.__file__).parent / "include"
    return compiled("wide", f"-I{headers}", "-O0", "-march=native", "-fno-math-errno", "-w")


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_agrees_with_the_oracle(wide, kind, mining, dtype):
    for rows, width, others, soft in ((1, 5, 0, False), (2, 4, 3, True), (7, 1, 5, False), (20, 3, 9, True)):
        hold_against_the_oracle(wide, Case(*batch(rows, width=width, dtype=dtype, others=others), kind, mining, soft))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "width", "others"), [(64, 32, 0), (65, 33, 31), (107, 70, 140)])
def test_several_tiles(wide, kind, mining, dtype, rows, width, others):
    """Tiles are 12 x 32 (float64: 12 x 16): full ones, and edges within and beyond the batch's own rows."""
    made = batch(rows, width=width, dtype=dtype, others=others)
    made[1][-1] = -1  # an anchor without a positive
    hold_against_torch(wide, Case(*made, kind, mining, soft=rows == 65))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
def test_gradients_at_once_are_those_of_the_backward_pass(wide, kind, mining):
    case = Case(*batch(70, width=20, dtype=torch.float32, others=40), kind, mining, soft=mining == "all")
    each = run(wide, case, torch.ones(70))
    whole = run(wide, case._replace(reduction="mean"), torch.ones(()))
    assert torch.allclose(whole["grads"], each["grads"] / each["count"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ("cosine", "euclidean"))
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_gradients_of_the_first_rows_only(wide, kind, mining, reduction):
    case = Case(*batch(70, width=20, dtype=torch.float32, others=40), kind, mining, reduction=reduction)
    weights = torch.linspace(-1, 1, 70) if reduction == "none" else torch.ones(())
    whole, part = (run(wide, case, weights, rows)["grads"] for rows in (110, 70))
    assert whole.shape == (110, 20) and torch.equal(whole[:70], part)


def test_several_blocks_of_all_triplets(wide):
    """More anchors than have their distances in one block, in pairs."""
    x, _, others = batch(1100, width=9, others=20)
    case = Case(x, torch.arange(1100) // 2, (others[0], torch.arange(20)), "euclidean", "all", soft=True)
    hold_against_torch(wide, case)


@pytest.mark.parametrize("mining", ("hard", "semihard"))
def test_lengths_of_bfloat16_rows(wide, mining):
    """Products of such values leave float32; the cosine, of pairs of bfloat16 as of floats, does not depend on them."""
    x, labels, others = batch(80, width=33, dtype=torch.float32, others=40)
    x *= torch.tensor([1e37, 1e-11, 1, 1e20]).repeat(20)[:, None]
    x[5] = 0
    case = Case(x.bfloat16(), labels, (others[0].bfloat16(), others[1]), "cosine", mining)
    hold_against_torch(wide, case)
