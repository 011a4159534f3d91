"""What we take from transformers, imported after the one thing that it needs beside a CPU-only torch.

We do not need torchvision and do not install it, but transformers imports it wherever it finds it: where tests
compare with the reference, and in an environment that serves other programs too. The torchvision wheel on PyPI is
built for CUDA: beside a CPU-only torch its extension does not load, and `import torchvision` then fails on two
operators that nobody declared, and transformers with it. Nobody calls them here; their schemas are declared first,
and only where the extension cannot load.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch


def _declare_operators() -> None:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
            return  # the real operators; torchvision loads the same file again, to no effect
        except OSError:
            continue
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


_declare_operators()

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging  # noqa: E402

__all__ = [
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLForConditionalGeneration",
    "transformers_logging",
]
