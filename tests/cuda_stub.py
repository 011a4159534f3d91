"""A CUDA runtime for tests: `assets/cuda_stub.c` as a library, whose device memory is files that processes share."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from models.cuda_memory import CudaRuntime, DeviceType

if TYPE_CHECKING:
    import torch  # which a puppet does not wait for

LIBRARY = "libpericarp-cuda-stub.so"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """Compile the stub into `folder`, where its memory will lie too."""
    assert COMPILER is not None
    source, library = Path(__file__).parent / "assets" / "cuda_stub.c", folder / LIBRARY
    subprocess.run(
        [COMPILER, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"],
        check=True,
    )
    return library


def open_stub(library: str | Path = LIBRARY, device: int = 0) -> CudaRuntime:
    """The stub; by its mere name it is found through LD_LIBRARY_PATH, which children inherit."""
    return CudaRuntime(ctypes.CDLL(str(library)), device, device_type=DeviceType.CPU)


def open_gpu(_device: str) -> tuple[torch.device, CudaRuntime]:
    """In the place of `models.lending.open_gpu`: to torch, the stub's memory is a CPU's."""
    import torch

    return torch.device("cpu"), open_stub()


def memories(folder: Path) -> list[Path]:
    """What was allocated, the oldest first."""
    return sorted(folder.glob("memory-*"), key=lambda path: path.stat().st_ctime_ns)
