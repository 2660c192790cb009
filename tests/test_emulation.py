"""The CUDA kernels, compiled by g++ and run on the CPU by tests/native/simt.h, against the oracle and plain PyTorch."""

import numpy as np
import pytest
import torch

import triplet
from contract import MININGS, TYPES, batch, batches_in_doubt, check_integers, integer_batches, two_poles
from kernels import LARGE, SMALL, Case, arguments_of, compiled, hold_against_the_oracle, hold_against_torch, run
from triplet import DISTANCES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def emulation():
    """The emulated kernels."""
    return compiled("emulation", "-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off")


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_agrees_with_the_oracle(emulation, kind, mining, dtype):
    for rows, width, others, soft, processors in (
        (1, 5, 0, False, LARGE),
        (2, 4, 3, True, LARGE),
        (7, 5, 0, True, SMALL),
        (7, 1, 5, False, SMALL),
        (33, 8, 0, False, SMALL),
        (20, 3, 9, True, LARGE),
    ):
        made = batch(rows, width=width, dtype=dtype, others=others)
        hold_against_the_oracle(emulation, Case(*made, kind, mining, soft, processors=processors))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize(
    ("rows", "width", "others", "processors"),
    [(65, 16, 0, SMALL), (130, 19, 70, SMALL), (130, 36, 140, LARGE), (257, 8, 0, LARGE)],
)
def test_several_tiles(emulation, kind, mining, rows, width, others, processors):
    """Edges of tiles of 64 and of 128, own and others', with and without vector loads."""
    made = batch(rows, width=width, dtype=torch.float32, others=others)
    made[1][-1] = -1  # an anchor without a positive
    hold_against_torch(emulation, Case(*made, kind, mining, processors=processors, seed=rows))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", ("hard", "semihard"))
def test_several_tiles_in_double_precision(emulation, kind, mining):
    hold_against_torch(emulation, Case(*batch(130, width=19, others=70), kind, mining))


@pytest.mark.parametrize("kind", ("cosine", "euclidean"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize(("rows", "width", "others"), [(2, 5, 1), (130, 40, 0), (145, 51, 140)])
def test_tensor_cores(emulation, kind, dtype, mining, rows, width, others):
    """One product of halves, or three."""
    made = batch(rows, width=width, dtype=dtype, others=others)
    made[1][-1] = -1  # an anchor without a positive
    hold_against_torch(emulation, Case(*made, kind, mining, tensor_cores=True))


@pytest.mark.parametrize("kind", ("cosine", "euclidean"))
@pytest.mark.parametrize("unit", [2.0**-30, 1.0, 2.0**50])
def test_rows_split_in_two_halves(emulation, kind, unit):
    """Rows in any units, some of them a thousandth or ten thousand times as long as others, of columns as unlike."""
    x, labels, _ = batch(140, width=33, dtype=torch.float32)
    x = x * torch.tensor([1.0, 1e-3, 1e4])[torch.arange(140) % 3, None] * torch.logspace(-6, 0, 33) * unit
    found = run(emulation, Case(x, labels, None, kind, tensor_cores=True))
    plain = triplet.mine(x, labels, distance=kind, mining="hard", impl="torch")
    assert found["positive"].tolist() == plain.positive.tolist()
    assert found["negative"].tolist() == plain.negative.tolist()


@pytest.mark.parametrize(("kind", "dtype"), [("euclidean", torch.float32), ("cosine", torch.bfloat16)])
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize("processors", [SMALL, LARGE])
def test_tiles_without_positives(emulation, kind, dtype, mining, processors):
    """Batches whose classes lie side by side, in any order of their labels."""
    x, labels, others = batch(260, width=16, dtype=dtype, others=140)
    names = torch.randint(2**40, (51,), generator=torch.Generator().manual_seed(0))
    names = names[(torch.arange(400) + 3) // 8]  # classes that reach over the edges of tiles
    case = Case(x, names[:260], (others[0], names[260:]), kind, mining, processors=processors, tensor_cores=True)
    hold_against_torch(emulation, case)


def test_label_filters(emulation):
    """Tiles of 64 rows where a label meets itself are never missed, and of the rest few are mistaken for such."""
    names = torch.randint(2**40, (400,), generator=torch.Generator().manual_seed(0))
    for labels, anchors in ((names[torch.arange(3000) // 8], 2000), (names[torch.arange(300) % 50], 300)):
        groups = [part for side in (labels[:anchors], labels[anchors:]) for part in side.split(64) if len(part)]
        own = -(-anchors // 64)
        tiles = [(i, j) for j in range(own) for i in range(j + 1)]
        tiles += [(i, j) for j in range(own, len(groups)) for i in range(own)]
        exact = [bool(torch.isin(groups[i], groups[j]).any()) for i, j in tiles]
        found = emulation.mixed_tiles(labels.numpy(), anchors)
        assert len(found) == len(tiles) and all(found[t] for t, mixed in enumerate(exact) if mixed)
        assert sum(found) - sum(exact) <= 0.05 * len(tiles)


@pytest.mark.parametrize(("dtype", "factors"), [(torch.bfloat16, (5e37, 1e-30, 1)), (torch.float16, (200, 1e-3, 1))])
def test_lengths_of_rows_on_tensor_cores(emulation, dtype, factors):
    """Products of such values leave float32; the cosine does not depend on them."""
    x, labels, _ = batch(40, width=16, dtype=torch.float32)
    x = (x * torch.tensor(factors).repeat(14)[:40, None]).to(dtype)
    x[5] = 0
    hold_against_torch(emulation, Case(x, labels, None, tensor_cores=True))


def test_all_triplets_beyond_a_blocks_memory(emulation):
    """More positives than a block holds at a time."""
    x, _, _ = batch(700, width=4)
    labels = torch.arange(700)
    labels[90:690:2] = labels[2] = -1
    for soft in (False, True):
        case = Case(x[:3], labels[:3], (x[3:], labels[3:]), "euclidean", "all", soft)
        hold_against_torch(emulation, case)


def test_a_blocks_memory_full_of_positives(emulation):
    x, labels = batch(600, width=4)[0], torch.arange(600)
    labels[0] = labels[256:512] = -1
    for soft in (False, True):
        hold_against_torch(emulation, Case(x[:1], labels[:1], (x[1:], labels[1:]), "euclidean", "all", soft))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_all_triplets_of_more_anchors_than_are_taken_at_a_time(emulation, kind, tensor_cores):
    """And more candidates than a block's part of a gradient; negatives beyond what a block's threads hold at a time."""
    x, labels, others = batch(520, width=6, classes=130, dtype=torch.float32, others=70)
    hold_against_torch(emulation, Case(x * 0.2, labels, others, kind, "all", tensor_cores=tensor_cores))
    x, labels, others = batch(3, width=6, classes=3, dtype=torch.float32, others=2200)
    hold_against_torch(emulation, Case(x, labels, others, kind, "all", soft=True, tensor_cores=tensor_cores))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("temperature", [0.003, 0.06, 0.093, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_margin_of_all_triplets_near_and_far(emulation, kind, temperature, dtype):
    """Losses from next to nothing to hundreds keep their digits, and so do gradients, whether a product has room for
    the factors of many triplets, of four, or none."""
    x, weights = two_poles(1100).to(dtype), torch.tensor([1.0, -0.5])
    for labels in (torch.arange(1100) % 2, torch.arange(1100) // 9, torch.arange(1100).clamp(max=1030) // 2):
        case = Case(x[:2], labels[:2], (x[2:], labels[2:]), kind, "all", soft=True, temperature=temperature)
        found, rows = run(emulation, case, weights), case.rows().requires_grad_()
        losses, _ = triplet.losses_and_counts(rows[:2], labels[:2], (rows[2:], labels[2:]), case.settings())
        rtol = 1e-11 if dtype == torch.float64 else 1e-5 + 2e-6 / temperature
        assert np.allclose(found["losses"], losses.detach().numpy(), rtol=rtol, atol=1e-30)
        (exact,) = torch.autograd.grad(losses, rows, weights.double())
        assert (found["grads"].double() - exact).abs().max() <= 100 * rtol * exact.abs().max() + 1e-25


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "others"), [(2, 5, 1), (130, 1, 0), (145, 40, 140), (9, 129, 3), (9, 512, 0)]
)
def test_all_triplets_on_tensor_cores(emulation, kind, dtype, rows, width, others):
    """Edges of tiles, own and others'; as many columns as tiles of gradients do not divide."""
    width += width == 1 and kind == "cosine"  # of one column the gradients are 0
    x, labels, others = batch(rows, width=width, others=others)
    x, others = (x / width**0.5).to(dtype), others and ((others[0] / width**0.5).to(dtype), others[1])
    labels[-1] = -1  # an anchor without a positive
    for soft in (False, True):
        hold_against_torch(emulation, Case(x, labels, others, kind, "all", soft, tensor_cores=True))


@pytest.mark.parametrize("kind", ("euclidean", "sqeuclidean"))
@pytest.mark.parametrize(
    ("dtype", "tensor_cores"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)]
)
def test_all_triplets_of_near_rows(emulation, kind, dtype, tensor_cores):
    """Where |x|^2 + |y|^2 - 2 x.y cancels, distances and gradients keep their digits; wherever the rows are, and in any
    units. Near rows are positives here and negatives there."""
    x, _, _ = batch(150, width=40)
    x[1::2] = x[::2] + x[1::2] * torch.logspace(-9, 0, 75, dtype=torch.float64)[:, None]
    x[1] = x[0]  # copies
    far = 100 * (dtype == torch.float64)
    for rows, labels in (
        (x * 0.1 + far, torch.arange(150) % 30),
        (x * 0.1 + far, torch.arange(150) // 2),
        ((x * 0.1 + 5) * 2.0**60, torch.arange(150) // 2 % 25),  # where the margin is 0, nearly
    ):
        hold_against_torch(emulation, Case(rows.to(dtype), labels, None, kind, "all", tensor_cores=tensor_cores))


@pytest.mark.parametrize(("processors", "tensor_cores"), [(SMALL, False), (LARGE, False), (LARGE, True)])
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize("kind", DISTANCES)
def test_integers_are_mined_as_in_integer_arithmetic(emulation, kind, mining, processors, tensor_cores):
    for x, labels, dtype in integer_batches():
        case = Case(x.to(dtype), labels, None, kind, mining, processors=processors, tensor_cores=tensor_cores)
        found = run(emulation, case)
        check_integers(found["positive"], found["negative"], x, labels, kind, mining)


@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize("kind", ("cosine", "euclidean"))
@pytest.mark.parametrize(("width", "processors"), [(1, SMALL), (8, LARGE), (37, LARGE)])
def test_rows_in_doubt_are_mined_as_on_the_cpu(emulation, kind, mining, width, processors):
    """Distances that are equal or nearly so, by rows in any units."""
    batches, labels = batches_in_doubt(width)
    for name, rows in batches.items():
        x, others = rows[:250], (rows[250:], labels[250:])
        found = run(emulation, Case(x, labels[:250], others, kind, mining, processors=processors, tensor_cores=True))
        plain = triplet.mine(x, labels[:250], distance=kind, mining=mining, others=others, impl="torch")
        assert found["positive"].tolist() == plain.positive.tolist(), name
        assert found["negative"].tolist() == plain.negative.tolist(), name


@pytest.mark.parametrize("kind", DISTANCES)
def test_equal_rows(emulation, kind):
    """The lowest row is the choice of all: one row's list holds nearly every pair."""
    case = Case(torch.ones(150, 7), torch.arange(150) % 2, None, kind)
    found = run(emulation, case, torch.ones(150))
    assert found["positive"].tolist() == [2, 3] + [0, 1] * 74 and found["negative"].tolist() == [1, 0] * 75
    assert np.allclose(found["losses"], 0.3) and found["grads"].abs().max() < 1e-5


@pytest.mark.parametrize("kind", ("cosine", "euclidean"))
@pytest.mark.parametrize("seed", range(3))
def test_more_copies_than_are_kept(emulation, kind, seed):
    """Rounding may put copies in tiles without positives before those, of lower rows, in tiles with some."""
    x, _, _ = batch(180, width=11, dtype=torch.float32, seed=seed)
    x[:150] = x[0]
    case = Case(x, torch.arange(180) // 2, None, kind, processors=SMALL)
    assert run(emulation, case)["negative"][:150].tolist() == [2, 2] + [0] * 148


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_row_that_many_chose(emulation, kind):
    """As many as a list holds, and more; rows longer than what a warp adds at a time."""
    x = 1 + batch(140, width=150, dtype=torch.float32)[0] / 2
    x[2] = 1  # in the middle: nearest to all but its own copy
    for rows, chosen_by in ((18, 16), (20, 18), (100, 98)):
        labels = torch.where(torch.arange(140) < rows, torch.arange(140) // 2, -1)
        case = Case(x[:rows], labels[:rows], (x[rows:], labels[rows:]), kind)
        assert (run(emulation, case)["negative"] == 2).sum() == chosen_by
        hold_against_torch(emulation, case)


def test_a_row_that_a_thousand_chose(emulation):
    """More pairs than a block looks through at a time."""
    x, labels, _ = batch(1100, width=3, dtype=torch.float32)
    rows, weights = torch.arange(1100), torch.linspace(-1, 1, 1100)
    positive, negative = (rows + 1) % 1100, torch.where(rows == 7, 8, 7)
    mined = np.array([1100]), positive.numpy(), negative.numpy()
    arguments = arguments_of(Case(x, labels, None, "sqeuclidean"))
    grads = emulation.backward(*arguments, SMALL, False, 0, weights.numpy(), 1100, *mined)
    leaf = x.double().requires_grad_()
    near, far = ((leaf - leaf[chosen]).square().sum(1) for chosen in (positive, negative))
    (exact,) = torch.autograd.grad(((near - far + 0.3).clamp(min=0) * weights).sum(), leaf)
    assert (torch.from_numpy(grads) - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mining", ("hard", "semihard"))
def test_rows_that_a_sample_does_not_prepare_for(emulation, dtype, mining):
    """The rows that set the scale are zeros; the others' squares overflow at that scale."""
    x, labels, _ = batch(100, width=6, dtype=torch.float32)
    x = (x * 2.0**70).to(dtype)
    sampled = torch.arange(32) * 100 // 32
    x[sampled] = 0
    for kind in ("euclidean", "sqeuclidean"):
        found = run(emulation, Case(x, labels, None, kind, mining), torch.ones(100))
        plain = triplet.mine(x, labels, distance=kind, mining=mining, impl="torch")
        assert found["positive"].tolist() == plain.positive.tolist() and (plain.positive >= 0).any()
        assert found["negative"].tolist() == plain.negative.tolist()


@pytest.mark.parametrize("kind", DISTANCES)
def test_launches(emulation, kind):
    """Kernels of a training call, forward and backward."""
    for mining, launches in (("hard", 4), ("semihard", 6), ("all", 8)):
        case = Case(*batch(70, width=9, dtype=torch.float32), kind, mining, reduction="mean")
        assert run(emulation, case, torch.tensor(1.0))["launches"] == launches


@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize("kind", ("euclidean", "sqeuclidean"))
def test_rows_far_from_the_origin(emulation, kind, mining):
    """Values on a grid of 1/64 stay exact under the offset."""
    x = torch.randint(-128, 129, (70, 16), generator=torch.Generator().manual_seed(0)) / 64
    labels = torch.arange(70) % 9
    near, far = (run(emulation, Case(x + by, labels, None, kind, mining)) for by in (0, 1000))
    assert all((near[rows] == far[rows]).all() for rows in ("positive", "negative"))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("factor", [2.0**60, 2.0**-30])
def test_magnitudes(emulation, kind, factor):
    """The order survives where float32 cannot hold the squares: powers of two change no digit."""
    x, labels, others = batch(40, width=16, dtype=torch.float32, others=9)
    case = Case(x, labels, others, kind, "semihard")
    scaled = case._replace(x=x * factor, others=(others[0] * factor, others[1]))
    near, far = run(emulation, case), run(emulation, scaled)
    assert all((near[rows] == far[rows]).all() for rows in ("positive", "negative"))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
def test_zero_rows_and_lone_anchors(emulation, kind, mining):
    x, labels, _ = batch(17)
    x[3] = x[8] = x[9] = 0
    labels[9], labels[16] = 77, 78
    hold_against_the_oracle(emulation, Case(x, labels, None, kind, mining))


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_norms_are_clamped(emulation, mining, tensor_cores):
    """A row shorter than 1e-12 is farther from itself than from others."""
    x, labels, _ = batch(20, dtype=torch.float32)
    x[::3] *= 1e-13
    hold_against_torch(emulation, Case(x, labels, None, "cosine", mining, tensor_cores=tensor_cores))


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("labels", [[3] * 9, list(range(9))])
def test_a_mean_over_nothing(emulation, mining, labels):
    case = Case(batch(9)[0], torch.tensor(labels), None, "euclidean", mining, reduction="mean")
    found = run(emulation, case, torch.tensor(1.0))
    assert found["loss"] == found["count"] == 0 and not found["grads"].any()


@pytest.mark.parametrize("mining", MININGS)
def test_upstream_gradients_of_any_stride(emulation, mining):
    case, weights = Case(*batch(20, dtype=torch.float32), mining=mining), torch.linspace(-1, 1, 40)
    for some in (weights[::2], weights[:1].expand(20)):
        strided, whole = (run(emulation, case, each)["grads"] for each in (some, some.contiguous()))
        assert torch.equal(strided, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mining", ("hard", "all"))
def test_gradients_of_halves_are_rounded(emulation, dtype, mining):
    x, labels, _ = batch(33, width=9, dtype=dtype)
    cases = [Case(rows, labels, None, "euclidean", mining) for rows in (x, x.float())]
    half, whole = (run(emulation, case, torch.ones(33))["grads"] for case in cases)
    assert torch.equal(half, whole.to(dtype))
    nan = torch.full((9,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # as GPUs have it
    case = Case(x[:9], torch.arange(9) % 3, None, "euclidean", mining)
    assert run(emulation, case, nan)["grads"].isnan().all()


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("labels", [[3] * 9, list(range(9)), [-(2**62), 2**62, 0] * 3])
def test_label_patterns(emulation, mining, labels):
    hold_against_the_oracle(emulation, Case(batch(9)[0], torch.tensor(labels), None, "euclidean", mining))


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_rows_give_nan(emulation, mining, value):
    for kind, where in ((kind, where) for kind in DISTANCES for where in (0, 1)):
        x, labels, others = batch(12, others=5, dtype=torch.float32)
        (x, others[0])[where][4, 2] = value
        for names in (labels, labels * 0):
            found = run(emulation, Case(x, names, others, kind, mining, reduction="none"), torch.ones(12))
            assert np.isnan(found["losses"]).all() and np.isnan(found["loss"]) and found["grads"].isnan().all()
            assert found["count"] == -1 and (found["positive"] == -1).all()


def test_a_non_finite_row_far_back(emulation):
    x, labels = torch.zeros(16450, 1), (torch.arange(16450) > 1).long()
    x[-1] = torch.nan
    found = run(emulation, Case(x[:2], labels[:2], (x[2:], labels[2:]), "sqeuclidean"))
    assert np.isnan(found["losses"]).all()


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_reductions(emulation, mining, reduction):
    case = Case(*batch(40, dtype=torch.float32, others=7), mining=mining)
    each = run(emulation, case, torch.full((40,), 0.7))
    whole = run(emulation, case._replace(reduction=reduction), torch.tensor(0.7))
    divisor = each["count"] if reduction == "mean" else 1
    assert whole["loss"] == pytest.approx(each["losses"].sum() / divisor, rel=1e-5)
    assert torch.allclose(whole["grads"], each["grads"] / divisor, atol=1e-6)


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("kind", ("cosine", "euclidean"))
def test_gradients_of_the_first_rows_only(emulation, kind, mining):
    """Those of the others, where nobody wants them, are not computed; the rest stays the same."""
    case = Case(*batch(70, width=9, dtype=torch.float32, others=30), kind, mining)
    whole, part = (run(emulation, case, torch.linspace(-1, 1, 70), rows)["grads"] for rows in (100, 70))
    assert whole.shape == (100, 9) and torch.equal(whole[:70], part)


@pytest.mark.parametrize("mining", MININGS)
def test_any_order_of_blocks_and_threads_gives_the_same_bits(emulation, mining):
    case = Case(*batch(70, width=9, classes=9, dtype=torch.float32, others=9), "euclidean", mining)
    runs = [run(emulation, case._replace(seed=seed), torch.linspace(-1, 1, 70)) for seed in (1, 1000, 2000)]
    for again in runs[1:]:
        assert all(np.array_equal(runs[0][name], again[name]) for name in again)


FAULTS = {
    1: "diverge",  # a thread returns before a barrier
    2: "read before it is written",
    3: "256 of 256",
    4: "read beside a write|read before it is written|write beside a read",
    5: "write beside a read|read beside a write",
    6: "diverge",  # half of the lanes shuffle
    7: "before a copy to it is waited for",
    8: "race|before a copy to it is waited for",  # by others than the thread that waited
    9: "race: a copy beside a read|before a copy to it is waited for",
    10: "never waited for",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_the_emulation_finds_faults(emulation, fault, message):
    assert emulation.toy(0, 1) == [255 - (t ^ 1) for t in range(256)]
    assert emulation.toy(11, 1) == [7] * 256
    for seed in range(3):
        with pytest.raises(RuntimeError, match=message):
            emulation.toy(fault, seed)
    assert emulation.toy(0, 2) == [255 - (t ^ 1) for t in range(256)]  # and is sound afterwards
