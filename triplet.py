"""The triplet loss with mining in the batch: `triplet_loss` and `mine`.

Two implementations keep one contract, written down in `triplet_loss`: the native op (csrc/), which fuses distances,
mining and loss and holds no (B, B) matrix, and plain PyTorch (triplet_torch.py), which is the easier one to read and
runs everywhere. This module checks the arguments and calls one of them.
"""

import functools
import importlib.util
import logging
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import triplet_torch
from triplet_torch import Settings

log = logging.getLogger("triplet")

# The position of a name is its code in the native op (csrc/triplet.h).
DISTANCES = ("cosine", "euclidean", "sqeuclidean")
MININGS = ("hard", "semihard", "all")
REDUCTIONS = ("none", "mean", "sum")
IMPLS = ("auto", "native", "torch")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NATIVE_BUILD = "pip install -e . (with a C++ compiler and, for GPUs, a CUDA toolkit)"


class Mined(NamedTuple):
    """Rows of the mined positive and negative of each anchor: (B,) int64 each, -1 in both where it takes no part."""

    positive: Tensor
    negative: Tensor


Codes = tuple[int, int, bool, float, float, int]  # `Settings` for the native op


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
            its gradient.
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
        GPU to find out. The same input gives the same bits again, for the same number of threads.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value; the message says what came.
        RuntimeError: impl="native" where the native op is not built.
    """
    find = resolve if torch.compiler.is_compiling() else resolve_once
    settings, codes = find(distance, mining, bool(soft_margin), float(margin), float(temperature), reduction, impl)
    if check(embeddings, labels, others, impl):
        return native_loss(embeddings, labels, others, codes)
    return triplet_torch.loss(embeddings, labels, others, settings)


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
    with torch.no_grad():
        if native:
            return Mined(*torch.ops.oneshot.triplet_forward(*tensors(embeddings, labels, others), *codes)[2:])
        return Mined(*triplet_torch.mine(embeddings, labels, others, settings))


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


def codes_of(settings: Settings) -> Codes:
    """The settings as the native op takes them."""
    numbers = DISTANCES.index(settings.distance), MININGS.index(settings.mining)
    reduction = REDUCTIONS.index(settings.reduction)
    return *numbers, settings.soft_margin, settings.margin, settings.temperature, reduction


resolve_once = functools.lru_cache(maxsize=256)(resolve)  # torch.compile warns of it


def check(embeddings: Tensor, labels: Tensor, others: tuple[Tensor, Tensor] | None, impl: str) -> bool:
    """Raise for wrong tensors; return whether the native op is to be used."""
    check_rows("embeddings", embeddings, "labels", labels)
    if others is not None:
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
    return use_native("cpu" if embeddings.is_cpu else embeddings.device.type, impl)


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


def tensors(embeddings: Tensor, labels: Tensor, others: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, ...]:
    """The native op's tensor arguments: labels as int64, everything contiguous."""
    if others is None:
        labels = labels if labels.dtype == torch.int64 else labels.long()
        return embeddings.contiguous(), labels.contiguous(), None, None
    return (*tensors(embeddings, labels, None)[:2], *tensors(*others, None)[:2])


# --------------------------------------------------------------------------------------------------------------- native


def load_library(name: str, what: str) -> str:
    """Load a library that setup.py built: "" if that works, else why not."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return f"{what} is not built"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"{what} does not load ({error})"
    return ""


@functools.cache
def native_library() -> str:
    """Load the native op and register what the stable ABI cannot: "" if it is there, else why it is not."""
    why = load_library("oneshot_C", "the native op")
    if why:
        return why
    torch.library.register_fake("oneshot::triplet_forward", fake_forward)
    torch.library.register_fake("oneshot::triplet_backward", fake_backward)
    torch.library.register_fake("oneshot::triplet_loss_and_gradient", fake_loss_and_gradient)
    torch.library.register_autograd("oneshot::triplet_forward", backward_of_op, setup_context=save_for_backward)
    return ""


@functools.cache
def cuda_library() -> str:
    """Load the native op's CUDA kernels: "" if the current GPU runs them, else why it does not."""
    why = native_library() or load_library("oneshot_C_cuda", "the native op's CUDA library")
    if not why and not torch.ops.oneshot.cuda_runs():
        why = "the native op's CUDA kernels are not built for this GPU (TORCH_CUDA_ARCH_LIST names those built for)"
    return why


@torch.compiler.assume_constant_result
def use_native(device: str, impl: str) -> bool:
    """Does the native op run on this device? A constant to torch.compile, which traces neither loading nor logging."""
    return decide_native(device, impl)


@functools.cache
def decide_native(device: str, impl: str) -> bool:
    """The same, found out and logged once for each device and `impl`."""
    libraries = {"cpu": native_library, "cuda": cuda_library}
    why = libraries[device]() if device in libraries else f"there is no native op for {device} tensors"
    if not why:
        log.info("triplet loss on %s: the native op", device)
    elif impl == "native":
        raise RuntimeError(f"{why}; build it with: {NATIVE_BUILD}")
    else:
        log.warning("triplet loss on %s: plain PyTorch, since %s; build it with: %s", device, why, NATIVE_BUILD)
    return not why


def native_loss(embeddings: Tensor, labels: Tensor, others: tuple[Tensor, Tensor] | None, codes: Codes) -> Tensor:
    """The loss by the native op. Eager mode takes the shorter way round PyTorch's registered autograd."""
    arguments = tensors(embeddings, labels, others)
    if torch.compiler.is_compiling():
        return torch.ops.oneshot.triplet_forward(*arguments, *codes)[0]
    wants_gradient = embeddings.requires_grad or (others is not None and others[0].requires_grad)
    if not (wants_gradient and torch.is_grad_enabled()):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.oneshot.triplet_forward.default(*arguments, *codes)[0]
    # computed with the loss, gradients cost less, but they wait for the backward pass in memory of the batch's size
    _, mining, *_, reduction = codes
    at_once = embeddings.is_cpu and REDUCTIONS[reduction] != "none"
    if at_once and (MININGS[mining] == "all" or embeddings.numel() <= 2**20):
        return NativeAtOnce.apply(*arguments, codes)
    return Native.apply(*arguments, codes)


class Native(torch.autograd.Function):
    """The native op in eager mode: half the overhead of autograd registered with the dispatcher."""

    @staticmethod
    def forward(ctx, embeddings, labels, other_embeddings, other_labels, codes):
        arguments = embeddings, labels, other_embeddings, other_labels, *codes
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.oneshot.triplet_forward.default(*arguments)
        save_for_backward(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        return backward_of_op(ctx, grad)[:5]


class NativeAtOnce(torch.autograd.Function):
    """The same with the gradients computed in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(ctx, embeddings, labels, other_embeddings, other_labels, codes):
        arguments = embeddings, labels, other_embeddings, other_labels, *codes
        loss, ctx.own, ctx.others = torch.ops.oneshot.triplet_loss_and_gradient.default(*arguments)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the native triplet loss can be differentiated once only; impl='torch' knows no such limit"
            )
        return ctx.own * grad, None, ctx.others * grad if ctx.needs_input_grad[2] else None, None, None


def save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.codes = inputs[4:]


@torch.autograd.function.once_differentiable
def backward_of_op(ctx, grad, *unused):
    """Gradients of the op's ten inputs; only the two of embeddings are not None."""
    embeddings, labels, other_embeddings, other_labels, count, positive, negative = ctx.saved_tensors
    grads = torch.ops.oneshot.triplet_backward(
        grad, embeddings, labels, other_embeddings, other_labels, count, positive, negative, *ctx.codes
    )
    return grads[0], None, grads[1] if other_embeddings is not None else None, *(None,) * 7


def fake_forward(
    embeddings, labels, other_embeddings, other_labels, distance, mining, soft, margin, temperature, reduction
):
    rows = embeddings.shape[0]
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    loss = embeddings.new_empty((rows,) if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    count = labels.new_empty(())
    mined = (labels.new_empty((rows,)), labels.new_empty((rows,)))
    return loss, count, *mined


def fake_backward(grad, embeddings, labels, other_embeddings, other_labels, *unused):
    grad_others = embeddings.new_empty((0,)) if other_embeddings is None else torch.empty_like(other_embeddings)
    return torch.empty_like(embeddings), grad_others


def fake_loss_and_gradient(embeddings, labels, other_embeddings, other_labels, *codes):
    loss = fake_forward(embeddings, labels, other_embeddings, other_labels, *codes)[0]
    grad_others = None if other_embeddings is None else torch.empty_like(other_embeddings)
    return loss, torch.empty_like(embeddings), grad_others
