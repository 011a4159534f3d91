"""Gradients on several cores: each thread takes whole parts of a step, and computes on one core.

On a CPU that others use too this is much faster than several cores inside every operation, where each waits for the
slowest at every one of thousands of barriers a step. The parts' gradients are added in their order, so that a seed
repeats a run whichever thread was quicker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Workers:
    """`count` threads that work for one set of parameters."""

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)
        self.count = count
        self._pool = ThreadPoolExecutor(count)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Between steps, work that is no part of one: all cores inside every operation."""
        torch.set_num_threads(self.count)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def backward(
        self, parameters: Sequence[Tensor], parts: Sequence[Callable[[], tuple[Tensor, T]]]
    ) -> list[T]:
        """Give each parameter the mean of the parts' gradients. A part returns its loss, and what else it tells."""
        wanted = [parameter for parameter in parameters if parameter.requires_grad]

        def differentiate(part: Callable[[], tuple[Tensor, T]]) -> tuple[tuple[Tensor | None, ...], T]:
            loss, told = part()
            return torch.autograd.grad(loss, wanted, allow_unused=True), told

        results = list(self._pool.map(differentiate, parts))
        for place, parameter in enumerate(wanted):
            found = [grad for grads, _ in results if (grad := grads[place]) is not None]
            parameter.grad = sum(found[1:], found[0]) / len(parts) if found else None
        return [told for _, told in results]
