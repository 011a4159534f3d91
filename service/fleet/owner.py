"""The main of the owner of lent weights: one copy on the GPU, which workers map, and which it looks after.

    python -m service.fleet.owner --fd N --parent PID --model NAME --device D --dtype T --offer N [--uid N]
        [--signer KEY --signature FILE --seal-key N]

It reads a checkpoint, puts it on the GPU, writes the offer, and then does nothing but check, when asked, that the copy
is as it was written. It sees no tenant's data and never will; like a worker it drops root before it says Hello. Where
the GPU's memory cannot be shared it says so when it is first asked.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from models import ModelError, ModelRefused, weights
from models.cuda_memory import CudaRuntime
from models.lending import LentWeights, NotShareable, lend, open_gpu
from models.tensors import DTYPES, native_dtype
from service.fleet.messages import OWNING, Check, Checked
from service.fleet.trusting import REFUSED, add_arguments, read_trust
from service.processes.parent import BROKEN, Parent, leave, name_process
from service.processes.sandbox import Confinement, confine
from service.processes.seccomp import filter_network
from service.processes.wire import Hello

OPEN_FILES = 1024
CANNOT_LEND = 4
"""Exit status: the model cannot be read, or finds no room."""

OpenGpu = Callable[[str], tuple[torch.device, CudaRuntime]]


def run(argv: Sequence[str], open_device: OpenGpu) -> NoReturn:
    """Own the weights until the parent goes away. `open_device` is the only thing that tests replace."""
    options = _parse(argv)
    parent = Parent(options.fd, options.parent, OWNING, keep=[options.offer, options.seal_key])
    name_process("prc-weights-" + (options.device.partition(":")[2] or "0"))
    faulthandler.enable()
    torch.set_num_threads(1)
    lent: LentWeights | NotShareable
    try:
        lent = _lend(options, open_device)
        lent.offer(options.offer)
    except NotShareable as exc:
        lent = exc
    except ModelError as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        leave(REFUSED if isinstance(exc, ModelRefused) else CANNOT_LEND)
    os.close(options.offer)
    sandbox = (*confine(Confinement(uid=options.uid, open_files=OPEN_FILES)), filter_network())
    parent.follow_to_death()  # a change of user cleared it
    parent.send(Hello(os.getpid(), sandbox=sandbox))
    while True:
        match parent.receive():
            case Check(id=number):
                parent.send(_check(number, lent))
            case _:
                leave(BROKEN)


def _check(number: int, lent: LentWeights | NotShareable) -> Checked:
    if isinstance(lent, NotShareable):
        return Checked(number, False, str(lent))
    start_s = time.perf_counter()
    intact = lent.intact()
    return Checked(number, intact, None, lent.size_bytes, (time.perf_counter() - start_s) * 1000)


def _lend(options: argparse.Namespace, open_device: OpenGpu) -> LentWeights:
    device, cuda = open_device(options.device)
    dtype = native_dtype(device) if options.dtype == "auto" else options.dtype
    return lend(weights.find(options.model, trust=read_trust(options)), DTYPES[dtype], cuda)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("owner", description="Started by the gateway only.", allow_abbrev=False)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--offer", type=int, required=True)
    # Of workers; it computes nothing that would need them.
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--uid", type=int)
    add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(sys.argv[1:], open_gpu)
