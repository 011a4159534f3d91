"""The puppet of `fake_worker.py` that borrows weights from the stub of `tests/cuda_stub.py`, without a model.

It obeys two commands more, each at a PLACE in the weights, and may do what a worker could that was taken over:

    peek PLACE       scores: the byte that lies there
    poke PLACE       change that byte
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from dataclasses import replace

from models import Reranker, Scores
from models.cuda_memory import CudaError
from service.fleet.worker import run
from tests.cuda_stub import open_stub
from tests.integration.fake_worker import Puppet, Running


class Borrower(Puppet):
    """`address` is where it sees the weights."""

    def __init__(self, address: int) -> None:
        super().__init__()
        self._address = address

    def _obey(self, running: Running) -> Scores:
        command, _, argument = (running.job.query.text or "").partition(" ")
        if command not in ("peek", "poke"):
            return super()._obey(running)
        byte = ctypes.c_ubyte.from_address(self._address + int(argument))
        if command == "poke":
            byte.value ^= 1
        margins = (float(byte.value),) * len(running.job.candidates)
        return Scores(margins, input_tokens=1, image_tokens=0, computed_tokens=1)


def _load(options: argparse.Namespace) -> Reranker:
    if options.offer is None:
        return Puppet()
    offer = json.loads(os.pread(options.offer, 1 << 20, 0))
    try:
        puppet = Borrower(open_stub().open(bytes.fromhex(offer["handle"])))
    except CudaError as exc:
        alone = Puppet()
        alone.card = replace(Puppet.card, unlent=str(exc))
        return alone
    puppet.card = replace(Puppet.card, weights="lent")
    return puppet


if __name__ == "__main__":
    run(sys.argv[1:], _load)
