"""An owner of lent weights whose GPU is the stub of `tests/cuda_stub.py`; all else is the real one."""

from __future__ import annotations

import sys

from service.fleet.owner import run
from tests.cuda_stub import open_gpu

if __name__ == "__main__":
    run(sys.argv[1:], open_gpu)
