"""A checkpoint's tensors as its files hold them, and the dtype to compute in."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from models import ModelFailed
from models.headers import LENGTH_BYTES, check_header, header_size

FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""What x86 and ARM call the instructions without which bf16 would be emulated on a CPU, and slow."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def native_dtype(device: torch.device) -> Literal["bf16", "fp32"]:
    """The dtype that `device` multiplies fastest in: bf16 on a GPU, and on a CPU that has instructions for it."""
    if device.type != "cpu":
        return "bf16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in FAST_BF16) else "fp32"


def map_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of `files`, as a view of a private mapping of its file: nothing is read yet.

    Raises `OSError` or safetensors' own error where a file cannot be read, `HeaderInvalid` where its header is odd,
    `ModelFailed` where two hold one tensor.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        with file.open("rb") as raw:
            head = raw.read(LENGTH_BYTES)
            head += raw.read(header_size(head) - LENGTH_BYTES)
            check_header(head, raw.seek(0, io.SEEK_END))
        with safe_open(file, framework="pt", device="cpu", backend="mmap") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name in tensors:
                    raise ModelFailed(f"two files hold a tensor {name!r}")
                tensors[name] = opened.get_tensor(name)
    return tensors
