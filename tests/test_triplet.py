"""triplet.py and the native op against a plain-Python oracle: implementation x device x type x mining x distance."""

import contextlib
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import contract
import oracle
import triplet
from contract import IMPLS, MININGS, TYPES, batch, batches_in_doubt, check_integers, compare, integer_batches
from triplet import DISTANCES, mine, triplet_loss

COMPILED = [impl for impl in IMPLS if impl.values[0] != "torch"]


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_agrees_with_the_oracle(impl, device, kind, mining, dtype):
    sizes = (1, 2, 7, 33) if mining == "all" else (1, 2, 7, 33, 65)
    for rows, others, soft in product(sizes, (0, 5), (False, True)):
        compare(impl, device, *batch(rows, dtype=dtype, others=others), kind, mining, soft)


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", ("hard", "semihard"))
def test_larger_batches(impl, device, kind, mining):
    compare(impl, device, *batch(257, width=3, dtype=torch.float32, others=40), kind, mining)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize(("rows", "width", "classes", "more"), [(1500, 37, 180, 700), (250, 4099, 60, 50)])
def test_agrees_with_the_other_implementation_at_size(impl, device, kind, mining, rows, width, classes, more):
    """Beyond the oracle's reach: several tiles, blocks, tasks and spans, in float64, where mined rows are the same."""
    x, labels, others = batch(rows, width=width, classes=classes, others=more)
    found = [
        mine(x.to(on), labels.to(on), distance=kind, mining=mining, impl=how, others=tuple(o.to(on) for o in others))
        for how, on in ((impl, device), ("torch", "cpu"))
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("labels", [[3] * 9, list(range(9)), [0] * 8 + [1], [-(2**62), 2**62, 0] * 3])
def test_label_patterns(impl, device, mining, labels):
    """One class, all different, an anchor without a positive, values at the ends of int64."""
    for kind in DISTANCES:
        compare(impl, device, batch(9)[0], torch.tensor(labels), None, kind, mining)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", triplet.LABEL_TYPES)
def test_label_types_and_strides(impl, device, dtype):
    x, labels, _ = batch(33)
    expected = triplet_loss(x.to(device), labels.to(device), impl=impl)
    strided = x.repeat_interleave(2, 0)[::2].T.contiguous().T.to(device)
    every_other = labels.to(dtype).repeat_interleave(3).to(device)[::3]
    assert triplet_loss(strided, every_other, impl=impl).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_begin_anywhere_in_memory(impl, device, dtype):
    x, labels, _ = batch(33, width=8, dtype=dtype)
    moved = torch.cat((x.new_zeros(1), x.flatten())).to(device)[1:].view(33, 8)
    expected = triplet_loss(x.to(device), labels.to(device), impl=impl).item()
    assert triplet_loss(moved, labels.to(device), impl=impl).item() == pytest.approx(expected)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
def test_ties_go_to_the_lowest_row(impl, device, mining):
    """Rows on a grid have exactly equal distances, and copies of rows."""
    x = torch.tensor([[float(i % 3), float(i // 3 % 2)] for i in range(24)], dtype=torch.float64)
    labels = torch.arange(24) // 6
    for kind in ("euclidean", "sqeuclidean"):
        compare(impl, device, x, labels, None, kind, mining)
    if mining == "hard":
        mined = mine(x.to(device), labels.to(device), distance="sqeuclidean", impl=impl)
        rows, names = x.tolist(), labels.tolist()
        for a in range(24):
            d = [oracle.distance(rows[a], row, "sqeuclidean") for row in rows]
            p = [j for j in range(24) if names[j] == names[a] and j != a]
            n = [j for j in range(24) if names[j] != names[a]]
            assert (mined.positive[a], mined.negative[a]) == oracle.mine(d, p, n, mining)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize("kind", DISTANCES)
def test_integers_are_mined_as_in_integer_arithmetic(impl, device, mining, kind):
    """Where distances are equal, the lowest row wins, and beyond the positive is strictly beyond."""
    for x, labels, dtype in integer_batches():
        found = mine(x.to(device, dtype), labels.to(device), distance=kind, mining=mining, impl=impl)
        check_integers(found.positive.tolist(), found.negative.tolist(), x, labels, kind, mining)


@pytest.mark.parametrize(("impl", "device"), COMPILED)
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("width", [1, 8, 37])
def test_rows_in_doubt_are_mined_alike(impl, device, mining, kind, width):
    """Distances that are equal or nearly so, by rows in any units: all implementations take the same rows."""
    batches, labels = batches_in_doubt(width)
    for name, rows in batches.items():
        others = rows[250:], labels[250:]
        native, plain = (
            mine(
                rows[:250].to(on),
                labels[:250].to(on),
                distance=kind,
                mining=mining,
                others=tuple(t.to(on) for t in others),
                impl=how,
            )
            for how, on in ((impl, device), ("torch", "cpu"))
        )
        assert torch.equal(native.positive.cpu(), plain.positive), name
        assert torch.equal(native.negative.cpu(), plain.negative), name


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("kind", DISTANCES)
def test_copies_and_equal_rows(impl, device, kind):
    """Distance 0 has gradient 0, and a copy of an anchor can be its positive; the lowest of equal rows wins."""
    x = torch.ones(300, 7, device=device, requires_grad=True)
    labels = torch.arange(300, device=device) % 2
    mined = mine(x, labels, distance=kind, impl=impl)
    assert mined.positive.tolist() == [2, 3] + [0, 1] * 149 and mined.negative.tolist() == [1, 0] * 150
    loss = triplet_loss(x, labels, 0.25, distance=kind, impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(0.25) and x.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("kind", ("euclidean", "sqeuclidean"))
@pytest.mark.parametrize("mining", ("hard", "semihard"))
def test_rows_far_from_the_origin_mine_correctly(impl, device, kind, mining):
    """Values on a grid stay exact under the offset, so the mined rows must be the same with and without it. The grid is
    so fine that no two of an anchor's distances are equal: rounding would decide whether one is beyond the other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2048, 2049, (257, 16), generator=generator) / 1024
    labels = torch.randint(30, (257,), generator=generator)
    compare(impl, device, x + 1000, labels, None, kind, mining)
    near, far = (
        mine((x + by).double().to(device), labels.to(device), distance=kind, mining=mining, impl=impl)
        for by in (0, 1000)
    )
    assert torch.equal(near.negative, far.negative) and torch.equal(near.positive, far.positive)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("kind", DISTANCES)
def test_zero_rows(impl, device, kind, mining):
    x, labels, _ = batch(17)
    x[3] = x[8] = x[9] = 0
    compare(impl, device, x, labels, None, kind, mining)


@pytest.mark.parametrize(("impl", "device"), COMPILED)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_norms_are_clamped(impl, device, mining, reduction):
    """A row shorter than 1e-12 has smaller cosines, and the norm it is divided by has no gradient."""
    x, labels, _ = batch(20)
    x[::3] *= 1e-13
    found = []
    for how, on in ((impl, device), ("torch", "cpu")):
        leaf = x.clone().to(on).requires_grad_()
        loss = triplet_loss(leaf, labels.to(on), 1.0, mining=mining, reduction=reduction, impl=how)
        found.append((loss.detach().cpu(), torch.autograd.grad(loss.sum(), leaf)[0].cpu()))
    (loss, grad), (expected, exact) = found
    assert torch.allclose(loss, expected) and ((grad - exact).norm(dim=1) <= 1e-9 * exact.norm(dim=1)).all()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("factor", [1e18, 1e-18, 1e-40])
@pytest.mark.parametrize("width", [1, 64, 4097])
def test_magnitudes(impl, device, factor, width):
    """The order survives what a float32 square does not: 1e18 * 64 columns, values whose squares are denormal or 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, width, generator=generator)
    labels = torch.arange(40, device=device) % 8
    for kind in ("cosine", "euclidean") if factor > 1 else ("euclidean",):
        if kind == "cosine" and width == 1:
            continue  # only +1 and -1: ties all over
        base, scaled = (mine((x * by).to(device), labels, distance=kind, impl=impl) for by in (1.0, factor))
        if factor == 1e-40 and width == 1:
            continue  # denormals keep too few digits to tell near rows apart
        assert (base.negative == scaled.negative).float().mean() > 0.9
        loss = triplet_loss((x * factor).to(device).requires_grad_(), labels, distance="cosine", impl=impl)
        assert torch.isfinite(loss)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
def test_cosine_of_rows_whose_squares_overflow(impl, device, mining):
    """Float64 has no wider type to square in; a power of two changes nothing but the gradients' scale."""
    x, labels, _ = batch(33)
    results = []
    for factor in (1.0, 2.0**600):
        leaf = (x * factor).to(device).requires_grad_()
        loss = triplet_loss(leaf, labels.to(device), mining=mining, impl=impl)
        (grad,) = torch.autograd.grad(loss, leaf)
        results.append(torch.cat((loss.detach()[None], factor * grad.flatten())).cpu())
    assert torch.allclose(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_no_anchor_takes_part(impl, device, mining, soft, dtype):
    for labels in (torch.zeros(6), torch.arange(6), torch.zeros(1)):
        x = torch.randn(len(labels), 4, device=device, dtype=dtype, requires_grad=True)
        for reduction in ("mean", "sum", "none"):
            loss = triplet_loss(
                x, labels.long().to(device), mining=mining, soft_margin=soft, reduction=reduction, impl=impl
            )
            assert loss.abs().sum() == 0
            assert torch.autograd.grad(loss.sum(), x)[0].abs().sum() == 0


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["embeddings", "others"])
def test_non_finite_embeddings_give_nan(impl, device, mining, value, where):
    for kind, one_class, reduction in product(DISTANCES, (False, True), ("mean", "none")):
        x, labels, others = batch(12, others=260)  # three pieces of rows
        (x[4] if where == "embeddings" else others[0][140])[2] = value
        leaves = [x.to(device).requires_grad_(), others[0].to(device).requires_grad_()]
        names = [(t * (not one_class)).to(device) for t in (labels, others[1])]
        loss = triplet_loss(
            leaves[0],
            names[0],
            distance=kind,
            mining=mining,
            others=(leaves[1], names[1]),
            reduction=reduction,
            impl=impl,
        )
        assert loss.isnan().all()
        assert all(grad.isnan().all() for grad in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
def test_gradcheck(impl, device, mining):
    x, labels, others = batch(9, others=4)
    leaves = [x.to(device).requires_grad_(), others[0].to(device).requires_grad_()]
    for kind, soft, reduction in product(DISTANCES, (False, True), ("mean", "none")):

        def loss(a, b, kind=kind, soft=soft, reduction=reduction):
            far = (b, others[1].to(device))
            return triplet_loss(
                a,
                labels.to(device),
                distance=kind,
                mining=mining,
                soft_margin=soft,
                reduction=reduction,
                others=far,
                impl=impl,
            )

        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_gradients_only_where_required(impl, device, needs):
    x, labels, others = batch(12, others=5)
    leaves = [t.to(device).requires_grad_(need) for t, need in zip((x, others[0]), needs, strict=True)]
    triplet_loss(leaves[0], labels.to(device), others=(leaves[1], others[1].to(device)), impl=impl).backward()
    for leaf, need in zip(leaves, needs, strict=True):
        assert (leaf.grad is not None) == need
    with torch.no_grad():
        assert not triplet_loss(leaves[0], labels.to(device), impl=impl).requires_grad


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(impl, device, mining, dtype):
    """At most twice the error, against float64, of the torch implementation."""
    x, labels, _ = batch(65, width=32, dtype=dtype)
    errors = []
    exact_leaf = x.double().requires_grad_()
    exact = triplet_loss(exact_leaf, labels, mining=mining, impl="torch")
    (exact_grad,) = torch.autograd.grad(exact, exact_leaf)
    for how, on in ((impl, device), ("torch", "cpu")):
        leaf = x.to(on).requires_grad_()
        loss = triplet_loss(leaf, labels.to(on), mining=mining, impl=how)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss.dtype == torch.float32 and grad.dtype == dtype
        errors.append((abs(loss.item() - exact.item()), float((grad.double().cpu() - exact_grad).abs().max())))
    assert errors[0][0] <= 2 * errors[1][0] + 1e-6 and errors[0][1] <= 2 * errors[1][1] + 1e-6


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("kind", DISTANCES)
def test_autocast_computes_in_float32(impl, device, mining, kind):
    x, labels, _ = batch(33, dtype=torch.float32)
    plain = triplet_loss(x.to(device), labels.to(device), mining=mining, distance=kind, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        cast = triplet_loss(x.to(device), labels.to(device), mining=mining, distance=kind, impl=impl)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", ["hard", "semihard"])
@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_autocast_mines_the_same_rows(impl, device, mining, kind):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(256, device=device) // 4
    plain = mine(x, labels, mining=mining, distance=kind, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        cast = mine(x, labels, mining=mining, distance=kind, impl=impl)
    assert all(map(torch.equal, plain, cast))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_scaled_losses_keep_the_digits_of_float16(impl, device):
    """Unscaled, most gradients of a large batch are too small for this type."""
    x = 5 * torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    labels, found = torch.arange(512, device=device) // 4, []
    for dtype in (torch.float16, torch.float32):
        leaf = x.half().to(device, dtype).requires_grad_()
        (65536 * triplet_loss(leaf, labels, mining="all", soft_margin=True, impl=impl)).backward()
        found.append(leaf.grad.float())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-3


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
def test_compiles_to_one_graph(impl, device, mining):
    x, labels, _ = batch(16, dtype=torch.float32)
    labels = labels.to(device)

    def loss(x):
        return triplet_loss(x * 2, labels, mining=mining, soft_margin=True, impl=impl) * 3

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = x.to(device).clone().requires_grad_()
        value = run(leaf)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
def test_one_graph_for_batches_of_any_size(impl, device, mining):
    """Compiled, with gradients, and exported."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x, labels):
        return triplet_loss(x, labels, mining=mining, impl=impl)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for rows in range(8, 30, 2):
        x, labels, _ = batch(rows, dtype=torch.float32)
        leaves, labels = [x.to(device).clone().requires_grad_() for _ in range(2)], labels.to(device)
        for run, leaf in zip((loss, compiled), leaves, strict=True):
            run(leaf, labels).backward()
        assert torch.allclose(leaves[0].grad, leaves[1].grad, atol=1e-6)
    assert counter.frame_count <= 2

    class Module(torch.nn.Module):
        def forward(self, x, labels):
            return loss(x, labels)

    rows = torch.export.Dim("rows", min=2)
    given = leaves[0].detach(), labels
    exported = torch.export.export(Module(), given, dynamic_shapes=({0: rows}, {0: rows})).module()
    fewer = given[0][:20], labels[:20]
    assert torch.allclose(exported(*fewer), loss(*fewer), atol=1e-6)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
def test_labels_made_in_inference_mode(impl, device, mining):
    x, labels, _ = batch(16, dtype=torch.float32)
    with torch.inference_mode():
        made = labels.to(device).clone()
    gradients = []
    for each in (labels.to(device), made):
        leaf = x.to(device).clone().requires_grad_()
        triplet_loss(leaf, each, mining=mining, reduction="none", impl=impl).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
def test_forward_mode_gradients_of_plain_pytorch(mining, kind):
    x, labels, _ = batch(12)
    to, leaf = torch.randn_like(x), x.clone().requires_grad_()

    def loss(x):
        return triplet_loss(x, labels, mining=mining, distance=kind, impl="torch")

    loss(leaf).backward()
    _, forward = torch.func.jvp(loss, (x,), (to,))
    assert torch.allclose(forward, (leaf.grad * to).sum())


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_shapes_without_values(mining, kind, impl):
    """On the meta device, and as fake tensors."""
    for context, device in ((contextlib.nullcontext(), "meta"), (FakeTensorMode(), "cpu")):
        with context:
            x = torch.empty(12, 5, device=device, requires_grad=True)
            losses = triplet_loss(
                x, torch.zeros(12, dtype=torch.long, device=device), mining=mining, reduction="none", impl=impl
            )
            losses.sum().backward()
            assert losses.shape == (12,) and x.grad.shape == x.shape
            if mining != "all":
                mined = mine(x, torch.zeros(12, dtype=torch.long, device=device), mining=mining, impl=impl)
                assert mined.positive.shape == (12,)


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("temperature", [0.0115, 0.021, 0.09, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_margin_of_all_triplets_near_and_far(impl, device, kind, temperature, dtype):
    """Rows at two poles: losses from next to nothing to hundreds keep their digits, and so do gradients."""
    x = contract.two_poles(26).to(dtype)
    rows = x.double().tolist()
    for labels in (torch.arange(26) % 2, torch.arange(26) // 9, torch.arange(26) // 2):
        losses, _, gradient = oracle.triplet_loss(rows, labels.tolist(), 26, kind, "all", 0, True, temperature)
        keywords = dict(distance=kind, mining="all", soft_margin=True, temperature=temperature, impl=impl)
        leaf = x.to(device).requires_grad_()
        each = triplet_loss(leaf, labels.to(device), reduction="none", **keywords)
        exact = torch.tensor(losses, dtype=torch.float64)
        assert torch.allclose(each.double().cpu(), exact, rtol=1e-5 + 2e-6 / temperature, atol=1e-30)
        (grad,) = torch.autograd.grad(each.sum(), leaf)
        exact = torch.tensor(gradient([1.0] * 26), dtype=torch.float64)
        assert (grad.double().cpu() - exact).abs().max() <= 1e-3 * exact.abs().max() + 1e-25


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("kind", DISTANCES)
def test_same_input_same_bits(impl, device, mining, kind):
    x, labels, others = batch(300, width=37, classes=40, dtype=torch.float32, others=150)
    x[100:200], x[200:] = x[:100], x[:100] + 1e-5 * x[200:]  # ties, and rows so close that they are compared exactly

    def once():
        leaf = x.to(device).requires_grad_()
        far = (others[0].to(device), others[1].to(device))
        loss = triplet_loss(leaf, labels.to(device), mining=mining, distance=kind, others=far, impl=impl)
        return loss.detach().clone(), *torch.autograd.grad(loss, leaf)

    runs = [once() for _ in range(3)]
    threads = torch.get_num_threads()
    if impl == "native":  # here for any number of threads
        for others_than in (threads % 3 + 1, threads + 2):
            torch.set_num_threads(others_than)
            runs.append(once())
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize(
    ("rows", "anchors", "reduction"),
    [(63, 63, "mean"), (63, 63, "none"), (63, 30, "mean"), (63, 30, "none"), (1500, 1500, "sum")],  # blocks of anchors
)
def test_gradients_of_close_rows(impl, device, kind, rows, anchors, reduction):
    """In float32, rows of all classes 1e-2 to 1e-6 apart, and copies: the derivative of a distance divides by it."""

    def gradient(x, impl):
        leaf = x.requires_grad_()
        settings = {"distance": kind, "mining": "all", "soft_margin": True, "temperature": 0.5, "reduction": reduction}
        names = labels.to(x.device)
        others = (leaf[anchors:], names[anchors:]) if anchors < rows else None
        loss = triplet_loss(leaf[:anchors], names[:anchors], others=others, impl=impl, **settings)
        return torch.autograd.grad(loss.sum(), leaf)[0].double().cpu()

    x, labels, _ = batch(rows // 3, width=19, classes=rows // 2, dtype=torch.float32)
    gaps = torch.logspace(-2, -6, len(x))[:, None] * torch.randn(len(x), 19, generator=torch.Generator().manual_seed(0))
    x, labels = torch.cat((x, x + gaps, x)), torch.cat((labels, labels + 1, labels + 2))
    expected = gradient(x.double(), "torch")
    found = gradient(x.to(device), impl)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("kind", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize(("size", "far"), [(1, 1e5), (1, 1e8), (1, 1e30), (1e20, 1e30), (1e-21, 1e-11)])
@pytest.mark.parametrize("soft", [False, True])
def test_a_row_far_away_takes_no_digits_from_the_others(impl, device, kind, size, far, soft):
    if size != 1 and impl == "torch" or kind == "sqeuclidean" and (far > 1e18 or size != 1):
        return  # squares leave the type's range
    x = torch.cat((size * torch.randn(40, 7, generator=torch.Generator().manual_seed(0)), torch.full((1, 7), far)))
    labels, found = torch.cat((torch.arange(40) // 4, torch.tensor([99]))), []
    for rows, by in ((x.double(), "torch"), (x.to(device), impl)):
        leaf, settings = rows.requires_grad_(), {"distance": kind, "mining": "all", "soft_margin": soft}
        settings |= {"temperature": size, "reduction": "sum"}
        loss = triplet_loss(leaf, labels.to(rows.device), 1.0 * size, impl=by, **settings)
        found.append((loss.detach().double().cpu(), torch.autograd.grad(loss, leaf)[0].double().cpu()))
    (expected, gradients), (loss, own) = found
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert (own - gradients).abs().max() < 2e-5 * gradients.abs().max()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("x", [torch.tensor([[0.0, 0], [3e19, 0], [0, 1e19], [0, 2e19]]), 3e19 * torch.eye(4)])
def test_squares_that_overflow_are_never_a_perfect_loss(impl, device, mining, soft, x):
    labels = torch.tensor([0, 0, 1, 1], device=device)
    loss = triplet_loss(x.to(device), labels, distance="sqeuclidean", mining=mining, soft_margin=soft, impl=impl)
    assert not loss.isfinite()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("first", [False, True])
def test_one_square_of_many_that_overflows(impl, device, first):
    """Before or after the others, so that it is not in the same vector as all of them."""
    x = 1.2e19 * torch.tensor([[0, 1], [0.87, -0.5], [-0.87, -0.5]])
    labels = torch.tensor([0, 0, 1])
    parts = [(x, labels), (torch.zeros(32, 2), torch.zeros(32, dtype=torch.long))]
    x, labels = map(torch.cat, zip(*(parts if first else parts[::-1]), strict=True))
    loss = triplet_loss(x.to(device), labels.to(device), distance="sqeuclidean", mining="all", impl=impl)
    assert not loss.isfinite()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("kind", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-39])
def test_gradients_of_tiny_rows_are_finite(impl, device, kind, size):
    x = size * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    leaf = x.to(device).requires_grad_()
    loss = triplet_loss(leaf, torch.arange(12, device=device) // 3, distance=kind, mining="all", impl=impl)
    assert loss.item() == pytest.approx(0.3) and torch.autograd.grad(loss, leaf)[0].isfinite().all()


@pytest.mark.parametrize("mining", MININGS)
def test_precision_may_be_set_for_one_backend(mining):
    """PyTorch then refuses to say what holds for all."""
    x, labels, _ = batch(30, dtype=torch.float32)
    expected = triplet_loss(x, labels, mining=mining, impl="torch")
    rows = None if mining == "all" else mine(x, labels, mining=mining, impl="torch")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert torch.equal(triplet_loss(x, labels, mining=mining, impl="torch"), expected)
        assert rows is None or all(map(torch.equal, rows, mine(x, labels, mining=mining, impl="torch")))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("mining", MININGS)
def test_labels_can_be_mapped_over(mining):
    x, labels, _ = batch(20)
    stacked = torch.stack((x, x)), torch.stack((labels, labels.flip(0)))
    found = torch.func.vmap(lambda e, names: triplet_loss(e, names, mining=mining))(*stacked)
    assert torch.allclose(
        found, torch.stack([triplet_loss(*each, mining=mining) for each in zip(*stacked, strict=True)])
    )


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
def test_on_a_device_without_float64(monkeypatch, kind, mining):
    """Such as Apple's GPUs, simulated: no operation gives or takes a float64 tensor, and the answer is the same."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [value for value in (*args, out) if isinstance(value, torch.Tensor)]
            assert all(tensor.dtype != torch.float64 for tensor in tensors), function
            return out

    def found(x):
        leaf = x.clone().requires_grad_()
        loss = triplet_loss(leaf, labels, distance=kind, mining=mining, impl="torch")
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    x, labels, _ = batch(33, dtype=torch.float32)
    expected = found(x)
    monkeypatch.setattr(triplet, "has_float64", lambda device: False)
    with NoFloat64():
        for a, b in zip(found(x), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        if kind == "cosine":  # squares beyond float32
            assert torch.allclose(found(x * 1e25)[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("precision", ["high", "one backend"])
def test_rows_are_not_mined_on_products_that_are_less_exact(monkeypatch, precision):
    monkeypatch.setattr(triplet, "order_and_slack", lambda *_: pytest.fail("the slack is that of float32"))
    x, labels = torch.randn(8, 4), torch.arange(8) // 2
    try:
        if precision == "high":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        mine(x, labels, impl="torch")
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_triplets_in_parts(monkeypatch):
    """More pairs than are held at a time: the same losses and gradients."""
    x, labels = torch.randn(24, 4, generator=torch.manual_seed(0)), torch.arange(24) // 4
    found, pairs = [], 5
    for parts in (False, True):
        if parts:
            monkeypatch.setattr(triplet, "max", lambda a, b: min(pairs, b) if b > 1000 else max(a, b), raising=False)
        leaf = x.clone().requires_grad_()
        losses = triplet_loss(leaf, labels, mining="all", reduction="none", impl="torch")
        found.append((losses.detach(), torch.autograd.grad(losses.square().sum(), leaf)[0]))
    for whole, in_parts in zip(*found, strict=True):
        assert torch.allclose(whole, in_parts, atol=1e-6)


@pytest.mark.parametrize("mining", ["hard", "semihard"])
def test_rows_far_from_the_origin_mine_correctly_under_transforms(mining):
    """There float64 products decide; they are of differences."""
    x = torch.randint(-2048, 2049, (60, 8), generator=torch.manual_seed(0)) / 1024
    labels = torch.arange(60) // 4
    settings = {"mining": mining, "distance": "sqeuclidean", "impl": "torch"}
    expected = triplet_loss(x.double(), labels, **settings)
    (found,) = torch.func.vmap(lambda e: triplet_loss(e, labels, **settings))(x.double()[None] + 2.0**31)
    assert torch.allclose(found, expected)


def test_the_type_of_a_loss_is_known_before_it_is_computed():
    x, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) // 2
    for reduction in ("mean", "none"):
        compiled = torch.compile(lambda x, how=reduction: triplet_loss(x, labels, reduction=how), backend="aot_eager")
        assert torch.allclose(compiled(x), triplet_loss(x, labels, reduction=reduction), rtol=1e-12)
    codes = triplet.codes_of(triplet.Settings("cosine", "hard", False, 0.3, 1.0, "mean"))
    assert triplet.fake_forward(x, labels, 6, 6, *codes)[0].dtype == torch.float64


def test_tensors_on_two_devices_are_refused():
    x, labels = torch.randn(4, 3), torch.arange(4) // 2
    for others, names, message in (
        (None, labels.to("meta"), "labels are on meta, embeddings on cpu"),
        ((x.to("meta"), labels.to("meta")), labels, "others are on meta, embeddings on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            triplet_loss(x, names, others=others)
