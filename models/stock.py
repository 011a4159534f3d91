"""What we take from transformers and qwen_vl_utils, imported in the one order that works.

transformers imports torchvision where it finds it, and qwen_vl_utils always does. The torchvision wheel on
PyPI is built for CUDA: beside a CPU-only torch its extension does not load, and `import torchvision` then
fails on two operators that nobody declared. We never call them; their schemas are declared first, and only
where the extension cannot load.
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

from qwen_vl_utils.vision_process import fetch_image  # noqa: E402
from transformers import AttentionInterface  # noqa: E402
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

__all__ = [
    "AttentionInterface",
    "Qwen2VLImageProcessorPil",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLForConditionalGeneration",
    "fetch_image",
    "transformers_logging",
]
