"""Muon, an optimizer for weights that are matrices, here those of convolutions."""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5; Jordan chose them to be steep at 0


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of matrices (N, rows, columns) towards 1; they end between about 0.7 and 1.2.

    Newton-Schulz iterations of a fifth-degree polynomial, which need only products, and little precision: bfloat16 will
    do (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
    """
    a, b, c = COEFFICIENTS
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    for _ in range(steps):
        square = wide @ wide.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        wide = torch.baddbmm(wide, factor, wide, beta=a)
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


def split_for_muon(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights for Muon, all others) among those to be trained: Muon gets the convolutions except the first."""
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    convolutions = [name for name, parameter in net.named_parameters() if parameter.ndim == 4]
    hidden = {name: trained[name] for name in convolutions[1:] if name in trained}
    return list(hidden.values()), [each for name, each in trained.items() if name not in hidden]


class Muon(torch.optim.Optimizer):
    """Gradient descent in which each weight (out, in, height, width) moves by an orthogonal matrix (out, rest).

    The step is the orthogonalised Nesterov momentum, scaled so that its entries have root mean square 0.2 * lr, as
    Adam's typically have (Liu et al. 2025, arXiv:2502.16982, eq. 4). Weights of one shape are processed together.
    """

    def __init__(
        self,
        parameters,
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.05,
        dtype: torch.dtype = torch.float32,
    ):
        """`weight_decay` is decoupled: each step multiplies the weights by 1 - lr * weight_decay. Matrices are made
        orthogonal in `dtype`."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self.move(weights, group)

    def move(self, weights: list[Tensor], group: dict) -> None:
        """One step of weights of the same shape."""
        lr, momentum = group["lr"], group["momentum"]
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        velocities = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(velocities, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, velocities, momentum)
        steps = orthogonalise(torch.stack([each.flatten(1) for each in ahead]).to(self.dtype))
        scale = 0.2 * max(steps.shape[-2:]) ** 0.5
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        moves = [step.view(weight.shape).to(weight.dtype) for step, weight in zip(steps, weights, strict=True)]
        torch._foreach_add_(weights, moves, alpha=-lr * scale)
