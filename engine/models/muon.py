"""Muon, the optimizer of the embedded models' matrices: momentum whose update is made nearly orthogonal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values are driven into about [0.7, 1.2].

    `matrices` is (n, rows, columns), and so is the result. Newton-Schulz iteration X <- aX + b(XX')X + c(XX')^2 X from
    X = M / |M| with the quintic's coefficients of K. Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks" (2024).
    """
    a, b, c = _QUINTIC
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for parameters that are matrices.

        M <- momentum M + G
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonalised(G + momentum M)

    The scale is that of J. Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2): the update
    has the root mean square of AdamW's, so both share a learning rate. Matrices of one shape go through the iteration
    as one batch.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim != 2:
                    raise ValueError(f"Muon is for matrices, not for a parameter of shape {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient. `closure` is not supported and must be None."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                update = orthogonalised(torch.stack([self._momentum(weight, group["momentum"]) for weight in weights]))
                scale = 0.2 * max(shape) ** 0.5
                for weight, direction in zip(weights, update, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(direction, alpha=-group["lr"] * scale)

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        assert weight.grad is not None
        state["momentum"].mul_(momentum).add_(weight.grad)
        return weight.grad.add(state["momentum"], alpha=momentum)
