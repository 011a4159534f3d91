"""Muon for hidden matrices, in fp32: torch's own multiplies in bf16, which a CPU without instructions for it does many
times slower.

The momentum's orthogonal factor, by five Newton-Schulz steps, is the update (K. Jordan et al., "Muon", 2024); its size
is that of an AdamW update (J. Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS, MOMENTUM, LEAST_NORM = 5, 0.95, 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Every parameter is a matrix."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. No closure is taken."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonalise(parameter.grad.lerp(momentum, MOMENTUM))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * math.sqrt(max(parameter.shape)) * group["lr"])


def orthogonalise(matrix: Tensor) -> Tensor:
    """Near the orthogonal factor of `matrix` [rows, columns]: its singular values come to between 0.5 and 1.5."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    factor = matrix.T if tall else matrix
    factor = factor / factor.norm().clamp(min=LEAST_NORM)
    for _ in range(STEPS):
        gram = factor @ factor.T
        factor = torch.addmm(factor, torch.addmm(gram, gram, gram, beta=b, alpha=c), factor, beta=a)
    return factor.T if tall else factor
