"""A checkpoint's tensors in the stock model: mapped, and copied only where they must be converted.

Where the dtype asked for is the checkpoint's own, every parameter on the CPU is a view of its file's pages, which
all processes of the host share; where it is not, the parameters are converted copies, this process's own. A worker of
a fleet instead maps weights that were converted once for all (`models.sealing`), or has copied them all where it must
share none. Every mapping is private: whatever were written there would reach no other process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from models import ModelFailed, ModelNotFound, weights
from models.sealing import SealedWeights
from models.stock import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    transformers_logging,
)

FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""What x86 and ARM call the instructions without which bf16 would be emulated on a CPU, and slow."""


def native_dtype(device: torch.device) -> Literal["bf16", "fp32"]:
    """The dtype that `device` multiplies fastest in: bf16 on a GPU, and on a CPU that has instructions for it."""
    if device.type != "cpu":
        return "bf16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in FAST_BF16) else "fp32"


def load_model(
    checkpoint: weights.Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    shared: SealedWeights | None = None,
    own: bool = False,
) -> Qwen2_5_VLForConditionalGeneration:
    """The stock model with the checkpoint's weights on `device`, in evaluation mode, without gradients.

    It attends by SDPA where its own forward is called. On a CPU the weights are those of
    `shared`, which the first caller fills and seals; on a GPU it is sealed with nothing in it. With `own` they are
    copies in this process's own memory: nothing else of them is mapped once it returns. Raises `ModelNotFound`
    where config.json is not a Qwen2.5-VL configuration, `ModelFailed` where the weights cannot be read, where one is
    missing, has another shape or belongs to no part of the model, and where `shared` holds another model's.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = _read_config(checkpoint)
    try:
        model: Any
        loaded: dict[str, Any]
        model, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(  # type: ignore[misc]
            None,
            config=config,
            state_dict=_open(checkpoint, device, dtype, shared, own=own),
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as exc:  # transformers, safetensors and torch each raise errors of their own
        raise ModelFailed(f"the weights of model {checkpoint.name!r} cannot be loaded") from exc
    # transformers fills a missing weight with random numbers and goes on; a reranker must not.
    if any(loaded[keys] for keys in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs")):
        raise ModelFailed(f"the weights of model {checkpoint.name!r} are not whole, or not its own")
    whole: Qwen2_5_VLForConditionalGeneration = model.to(device).eval().requires_grad_(False)
    return whole


def _read_config(checkpoint: weights.Checkpoint) -> Any:
    try:
        config: Any = Qwen2_5_VLConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    except Exception as exc:  # transformers' strict dataclasses raise errors of their own
        raise ModelNotFound(
            f"the config.json of model {checkpoint.name!r} is not a Qwen2.5-VL configuration"
        ) from exc
    if "sliding_attention" in config.text_config.layer_types:
        raise ModelFailed(f"model {checkpoint.name!r} uses sliding windows, which packs do not know")
    return config


def _open(
    checkpoint: weights.Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    shared: SealedWeights | None,
    *,
    own: bool,
) -> dict[str, Tensor]:
    """The checkpoint's tensors as they are to be mapped, by the names of its files."""
    tensors = _map(weights.files(checkpoint.directory))
    if own and device.type == "cpu":
        # One after the other, so that no more than one is held twice.
        return {name: tensors.pop(name).to(dtype, copy=True) for name in list(tensors)}
    if own or shared is None:
        return tensors
    if device.type != "cpu":
        shared.fill({}, dtype, {})  # so that nobody else can fill it
        return tensors
    hashes = {file: sha256 for file, sha256 in checkpoint.hashes.items() if Path(file).match(weights.WEIGHTS)}
    shared.fill(tensors, dtype, hashes)
    tensors = _map([shared.path])
    if shared.hashes() != hashes or any(tensor.dtype != dtype for tensor in tensors.values()):
        raise ModelFailed("the shared weights are others than those asked for")
    return tensors


def _map(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of `files`, as a view of a private mapping of its file: nothing is read yet."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu", backend="mmap") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name in tensors:
                    raise ModelFailed(f"two files hold a tensor {name!r}")
                tensors[name] = opened.get_tensor(name)
    return tensors
