"""The triplet loss with mining in the batch: `triplet_loss` and `mine`.

Two implementations keep one contract, written down in `triplet_loss`: the native op (csrc/), which fuses distances,
mining and loss and holds no (B, B) matrix, and plain PyTorch, which is the easier one to read, runs everywhere, and is
what the native op is tested against. Candidates are the batch's rows and, behind them, the others.
"""

import functools
import importlib.util
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("triplet")

# The position of a name is its code in the native op (csrc/triplet.h).
DISTANCES = ("cosine", "euclidean", "sqeuclidean")
MININGS = ("hard", "semihard", "all")
REDUCTIONS = ("none", "mean", "sum")
IMPLS = ("auto", "native", "torch")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
LIBRARY = torch.library.Library("oneshot", "IMPL")  # what is registered in it stays so for as long as it is held
NATIVE_BUILD = "pip install -e . (with a C++ compiler and, for GPUs, a CUDA toolkit)"


class Mined(NamedTuple):
    """Rows of the mined positive and negative of each anchor: (B,) int64 each, -1 in both where it takes no part."""

    positive: Tensor
    negative: Tensor


class Settings(NamedTuple):
    """How a loss is computed; `triplet_loss` explains each."""

    distance: str
    mining: str
    soft_margin: bool
    margin: float
    temperature: float
    reduction: str


Codes = tuple[int, int, bool, float, float, int]  # `Settings` for the native op
Others = tuple[Tensor, Tensor] | None


def triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 0.3,
    *,
    distance: Literal["cosine", "euclidean", "sqeuclidean"] = "cosine",
    mining: Literal["hard", "semihard", "all"] = "hard",
    soft_margin: bool = False,
    temperature: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    others: tuple[Tensor, Tensor] | None = None,
    impl: Literal["auto", "native", "torch"] = "auto",
) -> Tensor:
    """The triplet loss of a batch, on triplets (anchor, positive, negative) found in the batch.

    Args:
        embeddings: (B, D) float64, float32, bfloat16 or float16; need not be normalised.
        labels: (B,) of any integer type and any values.
        margin: by how much the negative must be farther than the positive, in units of the distance.
        distance: "cosine" is 1 - cos, in 0..2, with norms clamped at 1e-12: a zero row has distance 1 to all rows and
            gradient 0. "euclidean" and "sqeuclidean" are those of the rows as they are; where the distance is 0, so is
            its gradient. Squares underflow: distances below about 1e-22 (float64: 1e-161) may cost as much as 0. And
            they overflow: from about 1e19 (float64: 1e154) on, the loss may be NaN or infinite.
        mining: "hard": each anchor with its farthest positive and nearest negative (Hermans et al. 2017,
            arXiv:1703.07737, eq. 5). "semihard": with its farthest positive and the nearest negative strictly farther
            than that, or the farthest negative if none is (after Schroff et al. 2015, arXiv:1503.03832, sec. 3.2).
            "all": every triplet. An anchor is never its own positive; a copy of it can be. Ties go to the lowest row.
        soft_margin: a triplet costs softplus((d_ap - d_an) / temperature), without margin, instead of
            max(0, d_ap - d_an + margin).
        temperature: above 0; on the unit sphere 0.1 to 0.2 gives the soft margin a useful gradient.
        reduction: "mean" over the anchors that take part; with mining "all", over the triplets of positive loss, or
            over all triplets if `soft_margin`. "sum". "none": (B,), the loss of each anchor ("all": the sum of its
            triplets), 0 where it takes no part.
        others: (embeddings (M, D), labels (M,)), candidates beside the batch's own rows, as gathered from other ranks
            or kept from earlier batches. They are never anchors. Row B + j of the candidates is others[j].
        impl: "native" is the compiled op, "torch" plain PyTorch, "auto" the native one where it can run (what runs, and
            why, is logged once).

    Returns:
        A scalar, or (B,) for reduction "none"; float64 for float64 input, else float32. Gradients reach `embeddings`
        and the others' embeddings, in their types, and are those of the loss with the mined rows held fixed.

        An anchor without a positive or without a negative takes no part. If none takes part, the loss is 0 and so are
        its gradients. If any embedding is not finite, the loss is NaN and so are all gradients; nothing waits for the
        GPU to find out. The same call gives the same bits again, for the same number of threads.

        Mined rows do not depend on the implementation. What is farther, nearer or a tie is decided on |a - b|^2, for
        cosine on cos |cos|, in float64 and a fixed order of summation (`decisive_order`). So rows of integers are mined
        as in integer arithmetic, as long as sums of squares stay below 2^53, for cosine below 2^26. Not so by plain
        PyTorch on a GPU, compiled, vmapped, or where float32 products are set to be less exact: there the last digits
        of float64 products decide. Nor for float64 rows beyond 1e-75..1e140, nor where differences of rows overflow.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value; the message says what came.
        RuntimeError: impl="native" where the native op is not built.
    """
    find = resolve if torch.compiler.is_compiling() else resolve_once
    settings, codes = find(distance, mining, bool(soft_margin), float(margin), float(temperature), reduction, impl)
    if check(embeddings, labels, others, impl):
        return native_loss(embeddings, labels, others, codes)
    losses, count = losses_and_counts(embeddings, labels, others, settings)
    if reduction == "mean":
        return losses.sum() / count.sum().clamp(min=1)
    return losses.sum() if reduction == "sum" else losses


def mine(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance: Literal["cosine", "euclidean", "sqeuclidean"] = "cosine",
    mining: Literal["hard", "semihard"] = "hard",
    others: tuple[Tensor, Tensor] | None = None,
    impl: Literal["auto", "native", "torch"] = "auto",
) -> Mined:
    """The rows that `triplet_loss` would use, under the same contract. Mining "all" is a ValueError."""
    if mining == "all":
        raise ValueError('mine() lists one triplet for each anchor; mining="all" has many')
    find = resolve if torch.compiler.is_compiling() else resolve_once
    settings, codes = find(distance, mining, False, 0.0, 1.0, "none", impl)
    native = check(embeddings, labels, others, impl)
    with torch.no_grad(), no_autocast(embeddings.device):
        if native:
            return Mined(*torch.ops.oneshot.triplet_forward(*op_arguments(embeddings, labels, others, codes))[2:])
        return Mined(*mined_rows(*prepare(embeddings, labels, others, settings), settings))


# ------------------------------------------------------------------------------------------------------------ arguments


def resolve(*options) -> tuple[Settings, Codes]:
    """The fields of `Settings` and `impl`, checked, as settings by name and by code. ValueError for a wrong value."""
    settings, impl = Settings(*options[:-1]), options[-1]
    for name, value, known in (
        ("distance", settings.distance, DISTANCES),
        ("mining", settings.mining, MININGS),
        ("reduction", settings.reduction, REDUCTIONS),
        ("impl", impl, IMPLS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not settings.temperature > 0:
        raise ValueError(f"temperature must be above 0, got {settings.temperature}")
    if settings.margin != settings.margin:
        raise ValueError("margin must be a number, got nan")
    return settings, codes_of(settings)


resolve_once = functools.lru_cache(maxsize=256)(resolve)  # torch.compile warns of it


def codes_of(settings: Settings) -> Codes:
    """The settings as the native op takes them."""
    distance, mining, *others, reduction = settings
    return DISTANCES.index(distance), MININGS.index(mining), *others, REDUCTIONS.index(reduction)


def check(embeddings: Tensor, labels: Tensor, others: Others, impl: str) -> bool:
    """Raise for wrong tensors; return whether the native op is to be used."""
    check_rows("embeddings", embeddings, "labels", labels)
    if others is not None:
        if not isinstance(others, (tuple, list)) or len(others) != 2:
            got = f"{len(others)} of them" if isinstance(others, (tuple, list)) else type(others).__name__
            raise TypeError(f"others must be a pair, (embeddings, labels), got {got}")
        check_rows("others[0]", others[0], "others[1]", others[1])
        if others[0].shape[1] != embeddings.shape[1] or others[0].dtype != embeddings.dtype:
            raise ValueError(
                f"others[0] must have the width and type of embeddings, {embeddings.shape[1]} and {embeddings.dtype}, "
                f"got {others[0].shape[1]} and {others[0].dtype}"
            )
        if others[0].device != embeddings.device:
            raise ValueError(f"others are on {others[0].device}, embeddings on {embeddings.device}")
    if impl == "torch":
        return False
    if not torch.compiler.is_compiling() and is_transformed(embeddings, others):
        if impl == "native":
            raise RuntimeError(
                "the native triplet loss has no torch.func transforms and no forward-mode gradients; use impl='torch'"
            )
        return False
    return use_native("cpu" if embeddings.is_cpu else str(embeddings.device), impl)


def is_transformed(embeddings: Tensor, others: Others) -> bool:
    """Is this call under a torch.func transform, or do tensors carry forward-mode gradients?"""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    leaves = [embeddings, *(others[:1] if others else ())]
    return any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves)


def check_rows(name: str, embeddings: Tensor, label_name: str, labels: Tensor) -> None:
    """Raise unless the two are rows (B, D) of floats and labels (B,) of integers on one device."""
    if not isinstance(embeddings, Tensor) or not isinstance(labels, Tensor):
        got = f"{type(embeddings).__name__} and {type(labels).__name__}"
        raise TypeError(f"{name} and {label_name} must be tensors, got {got}")
    if embeddings.ndim != 2 or embeddings.numel() == 0:
        raise ValueError(f"{name} must be (B, D), not empty, got {tuple(embeddings.shape)}")
    if embeddings.dtype not in TYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {embeddings.dtype}")
    if labels.ndim != 1 or labels.size(0) != embeddings.size(0):
        raise ValueError(f"{label_name} must be ({embeddings.shape[0]},), got {tuple(labels.shape)}")
    if labels.dtype not in LABEL_TYPES:
        raise TypeError(f"{label_name} must be integers, got {labels.dtype}")
    if not (labels.is_cpu and embeddings.is_cpu) and labels.device != embeddings.device:
        raise ValueError(f"{label_name} are on {labels.device}, {name} on {embeddings.device}")


def candidates_of(embeddings: Tensor, labels: Tensor, others: Others) -> tuple[Tensor, Tensor]:
    """All candidates (B + M, D) and their labels (B + M,) int64."""
    if labels.dtype != torch.int64:
        labels = labels.long()
    elif not torch.compiler.is_compiling() and labels.is_inference():  # the backward pass may not keep these
        labels = labels.clone()
    if others is None:
        return embeddings, labels
    return torch.cat((embeddings, others[0])), torch.cat((labels, others[1].long()))


# -------------------------------------------------------------------------------------------------------- plain PyTorch


def prepare(embeddings: Tensor, labels: Tensor, others: Others, settings: Settings) -> tuple[Tensor, ...]:
    """Candidates (B + M, D) in the type of the arithmetic, as given and, for cosine, normalised; and two masks
    (B, B + M): who is whose positive, who is whose negative. A non-finite value anywhere makes all candidates NaN."""
    rows = embeddings.shape[0]  # torch.compile takes len() for a constant
    x, labels = candidates_of(embeddings, labels, others)
    x = x if x.dtype == torch.float64 else x.float()
    finite = x.detach().isfinite().all()
    x = given = x * torch.where(finite, 1.0, torch.nan).to(x.dtype)
    if settings.distance == "cosine":
        least, wider = 1e-12, torch.float64 if has_float64(x.device) else torch.float32
        if x.dtype == wider:  # squares overflow: float64 from 1e154, float32 from 1e18
            largest = x.detach().abs().amax(1, keepdim=True).clamp(min=least)
            x, least = x / largest, least / largest
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wider)
        x = torch.where(norm == 0, 0, x / norm.clamp(min=least)).to(x.dtype)
    same = labels[:rows, None] == labels
    itself = torch.arange(x.shape[0], device=x.device) == torch.arange(rows, device=x.device)[:, None]
    return given, x, same & ~itself, ~same


def no_autocast(device: torch.device) -> AbstractContextManager:
    """The arithmetic in the block is in the types of its tensors."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def has_no_values(x: Tensor) -> bool:
    """Are shapes all that is known, as under torch.compile and FakeTensorMode, and on the meta device?"""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)


def has_float64(device: torch.device) -> bool:
    """Can this device compute in float64? Apple's GPUs cannot."""
    return device.type != "mps"


def losses_and_counts(embeddings: Tensor, labels: Tensor, others: Others, settings: Settings) -> tuple[Tensor, Tensor]:
    """The loss of each anchor (B,) and how many anchors or triplets it stands for in the mean (B,)."""
    with no_autocast(embeddings.device):
        given, x, positives, negatives = prepare(embeddings, labels, others, settings)
        if settings.mining == "all":
            losses, count = losses_of_all(x, positives, negatives, settings)
        else:
            positive, negative = mined_rows(given, x, positives, negatives, settings)
            takes_part, anchor = positive >= 0, x[: positives.shape[0]]
            near, far = (separation(anchor, x[row.clamp(min=0)], settings.distance) for row in (positive, negative))
            losses, count = torch.where(takes_part, cost(near - far, settings), 0), takes_part.long()
        return losses + 0 * x.detach().sum(), count  # NaN also where no anchor takes part


def separation(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """Distances (...,) of paired rows (..., D), by differences where there are any."""
    if distance == "cosine":
        return 1 - (a * b).sum(-1)
    squared = (a - b).square().sum(-1)
    if distance == "sqeuclidean":
        return squared
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def cost(gap: Tensor, settings: Settings) -> Tensor:
    """The loss of triplets with these d_ap - d_an."""
    if settings.soft_margin:
        return F.softplus(gap / settings.temperature, threshold=40)
    return F.relu(gap + settings.margin)


@torch.no_grad()
def mined_rows(
    given: Tensor, x: Tensor, positives: Tensor, negatives: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Rows (B,) of the mined positives and negatives, -1 in both where an anchor takes no part.

    From what `prepare` made. Only the order of the distances matters. Where rounding leaves two candidates in doubt,
    `decisive_order` tells; on a GPU, and where shapes may not depend on values, all is in float64 instead.
    """
    rows, cosine = positives.shape[0], settings.distance == "cosine"
    exact = x.device.type != "cpu" or has_no_values(x) or is_rounded_more()
    exact = exact or torch._C._functorch.peek_interpreter_stack() is not None
    order, slack = order_in_float64(given, rows, cosine) if exact else order_and_slack(x, rows, cosine)

    def nearest(may: Tensor, sign: int) -> Tensor:
        """The row (B,) of least sign * order among those an anchor may take, the lowest of equals; -1: none."""
        low = torch.where(may, torch.add(-slack, order, alpha=sign), torch.inf)
        if exact:
            return torch.where(low.amin(1) < torch.inf, low.argmin(1), -1)
        high = (low + 2 * slack).amin(1) + 2 * slack[:rows]
        anchor, row = (low < high[:, None]).nonzero(as_tuple=True)
        if len(anchor) > (high < torch.inf).count_nonzero():  # several that may be it
            several = anchor.bincount(minlength=rows)[anchor] > 1
            key = given.new_zeros(len(anchor), dtype=torch.float64)
            key[several] = sign * decisive_order(given, anchor[several], row[several], cosine)
            tied = key == key.new_full((rows,), torch.inf).scatter_reduce(0, anchor, key, "amin")[anchor]
            anchor, row = anchor[tied], row[tied]
        return row.new_full((rows,), -1).scatter_reduce(0, anchor, row, "amin", include_self=False)

    positive = nearest(positives, -1)
    if settings.mining == "semihard":
        chosen = positive.clamp(min=0)
        limit = order.gather(1, chosen[:, None])
        beyond = negatives & (order > limit)
        if not exact:
            doubt = (order - limit).abs() <= (2 * slack[:rows] + slack[chosen])[:, None] + slack
            anchor, row = (doubt & negatives & (positive >= 0)[:, None]).nonzero(as_tuple=True)
            if len(anchor):
                pairs = torch.cat((anchor, anchor)), torch.cat((row, chosen[anchor]))
                key, of_positive = decisive_order(given, *pairs, cosine).chunk(2)
                beyond[anchor, row] = key > of_positive
        negative = nearest(beyond, 1)
        if exact or (negative < 0).any():
            negative = torch.where(negative < 0, nearest(negatives, -1), negative)
    else:
        negative = nearest(negatives, 1)
    takes_part = (positive >= 0) & (negative >= 0)
    return torch.where(takes_part, positive, -1), torch.where(takes_part, negative, -1)


def is_rounded_more() -> bool:
    """May matrix products of float32 be less exact than those of float32 numbers?"""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it is set by backend, as with torch.backends.mkldnn.matmul.fp32_precision
        return True


def order_and_slack(x: Tensor, rows: int, cosine: bool) -> tuple[Tensor, Tensor]:
    """The order of each anchor's candidates (B, B + M), and a slack (B + M,): rounding moves an element (i, j) of the
    order by slack[i] + slack[j] at most."""
    width, unit, tiny = x.shape[1], torch.finfo(x.dtype).eps / 2, torch.finfo(x.dtype).tiny
    if cosine:
        return -(x[:rows] @ x.T), x.new_full((x.shape[0],), (0.6 * width + 16) * unit)
    x = x * power_near(x.abs().amax())  # so that nothing overflows
    x = x - x.mean(0)  # |b|^2 - 2ab cancels otherwise
    squares = x.square().sum(1)
    return torch.addmm(squares, x[:rows], x.T, alpha=-2), squares * (1.5 * width + 48) * unit + 4 * width * tiny


def order_in_float64(given: Tensor, rows: int, cosine: bool) -> tuple[Tensor, Tensor]:
    """The same without doubt, but for the last digits of float64 (on Apple's GPUs, of float32)."""
    if cosine:
        x, least = for_cosines(given)
        return cosine_order(x[:rows] @ x.T, x.square().sum(1), least), x.new_zeros(x.shape[0])
    x = given.double() if has_float64(given.device) else given
    x = x - x[0]
    x = x * power_near(x.abs().amax())
    return torch.addmm(x.square().sum(1), x[:rows], x.T, alpha=-2), x.new_zeros(x.shape[0])


def decisive_order(given: Tensor, anchor: Tensor, candidate: Tensor, cosine: bool) -> Tensor:
    """What orders an anchor's candidates, the nearest first, in every implementation: (pairs,) float64.

    |a - b|^2 or, for cosine, -cos |cos| |a|^2, as eight sums, column k in that of number k % 8. Differences are in the
    type of the rows; the squares of float32, and products, are exact in float64.
    """
    given, least = for_cosines(given) if cosine else (given, None)
    given = F.pad(given, (0, -given.shape[1] % 8))

    def total(terms: Tensor) -> Tensor:
        sums = terms.unflatten(1, (-1, 8)).cumsum(1)[:, -1]  # one after another, unlike sum(1)
        sums = sums[:, :4] + sums[:, 4:]
        sums = sums[:, :2] + sums[:, 2:]
        return sums[:, 0] + sums[:, 1]

    keys, at_once = [given.new_empty(0, dtype=torch.float64)], max(1, 2**22 // given.shape[1])
    for anchors, candidates in zip(anchor.split(at_once), candidate.split(at_once), strict=True):
        a, b = given[anchors], given[candidates]
        if cosine:
            keys.append(cosine_order(total(a * b), total(b.square()), least[candidates]))
        else:
            keys.append(total((a - b).double().square()))
    return torch.cat(keys)


def for_cosines(given: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float64, each brought near 1 by a power of two, and to what their squared norms are clamped."""
    x = given.double() if has_float64(given.device) else given
    power = power_near(x.abs().amax(1))
    return x * power[:, None], (1e-12 * power).square()


def power_near(largest: Tensor) -> Tensor:
    """The power of two that brings a value near 1, as far as there is one."""
    most = 1000 if largest.dtype == torch.float64 else 120
    return torch.exp2(-torch.frexp(largest).exponent.clamp(-most, most).to(largest.dtype))


def cosine_order(products: Tensor, squares: Tensor, least: Tensor) -> Tensor:
    """-cos |cos|, times the anchor's square, of products with candidates and the candidates' squares."""
    return torch.where(products == 0, 0, -products * products.abs() / torch.maximum(squares, least))


def losses_of_all(x: Tensor, positives: Tensor, negatives: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Summed loss (B,) of all triplets of each anchor, and how many of them count in the mean (B,)."""
    rows = positives.shape[0]
    if settings.distance == "cosine":
        distances = 1 - x[:rows] @ x.T
    elif forward_ad._current_level >= 0:  # torch.cdist has no forward-mode gradients
        distances = separation(x[:rows, None], x, settings.distance)
    else:
        distances = torch.cdist(x[:rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.square() if settings.distance == "sqeuclidean" else distances

    def of_pairs(distances: Tensor, anchor: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and count of the triplets of each pair (anchor, positive): (pairs,) each."""
        gap = distances[anchor, positive][:, None] - distances[anchor]
        losses = torch.where(negatives[anchor], cost(gap, settings), 0)
        return losses.sum(1), (losses > 0).sum(1)

    vmapped = torch._C._functorch.is_batchedtensor(positives)
    if has_no_values(x) or vmapped:  # no shapes that depend on data
        gap = distances[:, :, None] - distances[:, None, :]
        losses = torch.where(positives[:, :, None] & negatives[:, None, :], cost(gap, settings), 0)
        summed, count = losses.sum((1, 2)), (losses > 0).sum((1, 2))
    else:
        summed, count = distances.new_zeros(rows), torch.zeros(rows, dtype=torch.int64, device=x.device)
        anchors, partners = positives.nonzero(as_tuple=True)
        at_once = max(1, 2**24 // max(1, x.shape[0]))  # pairs whose triplets are held at a time
        for anchor, positive in zip(anchors.split(at_once), partners.split(at_once), strict=True):
            if len(anchors) > at_once:  # recompute in the backward pass, to hold one part only
                losses, counts = checkpoint(of_pairs, distances, anchor, positive, use_reentrant=False)
            else:
                losses, counts = of_pairs(distances, anchor, positive)
            summed, count = summed.index_add(0, anchor, losses), count.index_add(0, anchor, counts)
    if settings.soft_margin:
        count = positives.sum(1) * negatives.sum(1)
    return summed, count


# --------------------------------------------------------------------------------------------------------------- native


def load_library(name: str, what: str) -> str:
    """Load a library that setup.py built: "" if that works, else why not."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return f"{what} is not built"
    try:
        torch.ops.load_library(spec.origin)
        return ""
    except OSError as error:
        return f"{what} does not load ({error})"


@functools.cache
def native_library() -> str:
    """Load the native op and register what the stable ABI cannot: "" if that works, else the reason."""
    why = load_library("oneshot_C", "the native op")
    if why:
        return why
    fakes = {"forward": fake_forward, "backward": fake_backward, "loss_and_gradient": fake_loss_and_gradient}
    for name, fake in fakes.items():
        torch.library.register_fake(f"oneshot::triplet_{name}", fake)
        LIBRARY.impl(f"triplet_{name}", torch.library.fallthrough_kernel, "Autograd")  # `Native` has the gradients
    return ""


@functools.cache
def cuda_library(device: int = 0) -> str:
    """Load the native op's CUDA kernels: "" if the GPU of this index runs them, else why it does not."""
    why = native_library() or load_library("oneshot_C_cuda", "the native op's CUDA library")
    if not why and not torch.ops.oneshot.cuda_runs(device):
        why = "the native op's CUDA kernels are not built for this GPU (TORCH_CUDA_ARCH_LIST names those built for)"
    return why


def use_native(device: str, impl: str) -> bool:
    """Does the native op run on this device? A constant to torch.compile, which traces neither loading nor logging."""
    return decide_native(device, impl)


use_native._dynamo_marked_constant = True  # torch.compiler.assume_constant_result would import the compiler: 2 seconds


@functools.cache
def decide_native(device: str, impl: str) -> bool:
    """The same, decided and logged once for each device and `impl`."""
    kind, _, index = device.partition(":")
    libraries = {"cpu": native_library, "cuda": lambda: cuda_library(int(index or 0))}
    why = libraries[kind]() if kind in libraries else f"there is no native op for {kind} tensors"
    if not why:
        log.info("triplet loss on %s: the native op", device)
    elif impl == "native":
        raise RuntimeError(f"{why}; build it with: {NATIVE_BUILD}")
    else:
        log.warning("triplet loss on %s: plain PyTorch, since %s; build it with: %s", device, why, NATIVE_BUILD)
    return not why


def native_loss(embeddings: Tensor, labels: Tensor, others: Others, codes: Codes) -> Tensor:
    """The loss by the native op."""
    far, far_labels = others or (None, None)
    if not (torch.is_grad_enabled() and (embeddings.requires_grad or (others and far.requires_grad))):
        return torch.ops.oneshot.triplet_forward.default(*op_arguments(embeddings, labels, others, codes))[0]
    # computed with the loss, gradients cost less, but they wait for the backward pass in memory of the batch's size
    at_once = embeddings.is_cpu and REDUCTIONS[codes[-1]] != "none" and not torch.compiler.is_compiling()
    at_once = at_once and (MININGS[codes[1]] == "all" or embeddings.numel() <= 2**20)
    at_once = at_once and embeddings.dtype != torch.float16  # which needs the scale of the loss, or digits are lost
    return Native.apply(embeddings, far, labels, far_labels, codes, at_once)


class Native(torch.autograd.Function):
    """The native op and its gradient, computed `at_once` with the loss or in the backward pass."""

    @staticmethod
    def forward(ctx, embeddings, far, labels, far_labels, codes, at_once):
        others = None if far is None else (far, far_labels)
        arguments = op_arguments(embeddings, labels, others, codes, ctx.needs_input_grad[1])
        ctx.anchors, ctx.options, ctx.at_once = embeddings.shape[0], arguments[2:], at_once
        if at_once:
            loss, gradient = torch.ops.oneshot.triplet_loss_and_gradient.default(*arguments)
            ctx.save_for_backward(gradient)
        else:
            forward, ctx.op = two_ops(embeddings)
            loss, *found = forward(*arguments)
            ctx.save_for_backward(*arguments[:2], *found)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the native triplet loss can be differentiated only once; use impl='torch' for more")
        saved = ctx.saved_tensors
        gradient = saved[0] * grad if ctx.at_once else ctx.op(grad, *saved, *ctx.options)
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None, None, None
        return *gradient.split((ctx.anchors, gradient.shape[0] - ctx.anchors)), None, None, None, None


def two_ops(embeddings: Tensor) -> tuple:
    """Forward and backward op; on CUDA those that pass on all they computed, which torch.compile need not know of."""
    ops = torch.ops.oneshot
    if embeddings.is_cuda and not torch.compiler.is_compiling():
        return ops.triplet_forward_saving.default, ops.triplet_backward_saved.default
    return ops.triplet_forward.default, ops.triplet_backward.default


def op_arguments(embeddings: Tensor, labels: Tensor, others: Others, codes: Codes, for_others: bool = False) -> tuple:
    """What the op takes. It computes no gradient `for_others` where none is needed."""
    candidates, labels = candidates_of(embeddings, labels, others)
    gradient_rows = (candidates if for_others else embeddings).shape[0]
    return candidates.contiguous(), labels.contiguous(), embeddings.shape[0], gradient_rows, *codes


def fake_forward(candidates, labels, anchors, gradient_rows, *codes):
    dtype = torch.float64 if candidates.dtype == torch.float64 else torch.float32
    loss = candidates.new_empty((anchors,) if REDUCTIONS[codes[-1]] == "none" else (), dtype=dtype)
    return loss, labels.new_empty(()), labels.new_empty((anchors,)), labels.new_empty((anchors,))


def fake_backward(grad, candidates, labels, count, positive, negative, anchors, gradient_rows, *codes):
    return candidates.new_empty((gradient_rows, candidates.shape[1]))


def fake_loss_and_gradient(candidates, labels, anchors, gradient_rows, *codes):
    loss = fake_forward(candidates, labels, anchors, gradient_rows, *codes)[0]
    return loss, candidates.new_empty((gradient_rows, candidates.shape[1]))
