"""A worker without weights, for `bench/memory.py`: the same process, model, caches and work, but every weight is zero.

Its parameters lie in memory that is only ever read: the kernel then shows its one page of zeros everywhere and counts
it for nobody. What such a worker holds is the runtime's own footprint. Every score is 0.
"""

from __future__ import annotations

import argparse
import mmap
import sys

import torch
from torch import Tensor

from models import Reranker, load, loading
from models.lending import BorrowedWeights
from models.sealing import SealedWeights
from models.stock import Qwen2_5_VLForConditionalGeneration
from models.weights import Checkpoint
from service.fleet.worker import run


def load_weightless(options: argparse.Namespace) -> Reranker:
    """What the worker loads, as the worker loads it, with zeros instead of its weights as soon as these are there."""
    load_model = loading.load_model

    def without_weights(
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        shared: SealedWeights | BorrowedWeights | None = None,
        own: bool = False,
    ) -> Qwen2_5_VLForConditionalGeneration:
        model = load_model(checkpoint, device, dtype, shared=shared, own=own)
        for parameter in model.parameters():
            parameter.data = zeros(parameter)
        return model

    loading.load_model = without_weights
    return load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        shared=options.shared,
        own_weights=options.own_weights,
    )


def zeros(like: Tensor) -> Tensor:
    """Zeros that no page holds."""
    memory = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


if __name__ == "__main__":
    run(sys.argv[1:], load_weightless)
