"""A worker that borrows its weights from the stub of `tests/cuda_stub.py`; its model computes on the CPU."""

from __future__ import annotations

import argparse
import sys

from models import Reranker
from models.qwen import QwenReranker
from service.fleet.worker import run
from tests.cuda_stub import open_stub


def _load(options: argparse.Namespace) -> Reranker:
    return QwenReranker.load(
        options.model,
        device="cpu",
        dtype=options.dtype,
        threads=options.threads,
        shared=options.shared,
        offer=options.offer,
        cuda=None if options.offer is None else open_stub(),
    )


if __name__ == "__main__":
    run(sys.argv[1:], _load)
