"""The reference's image preparation: `qwen_vl_utils`, then the stock image processor, both as they are published.

The product calls neither; what it does itself is held to these, bit for bit. qwen_vl_utils imports torchvision, so
`models.stock`, which makes that possible beside a CPU-only torch, comes first.
"""

from __future__ import annotations

import models.stock  # noqa: F401

# isort: split
from qwen_vl_utils.vision_process import fetch_image
from qwen_vl_utils.vision_process import smart_resize as fetch_resize
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as process_resize

__all__ = ["Qwen2VLImageProcessorPil", "fetch_image", "fetch_resize", "process_resize"]
