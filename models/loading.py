"""A checkpoint's tensors in the stock model: mapped, and copied only where they must be converted.

Where the dtype asked for is the checkpoint's own, every parameter on the CPU is a view of its file's pages, which
all processes of the host share; where it is not, the parameters are converted copies, this process's own. A worker of
a fleet instead maps weights that were converted once for all (`models.sealing`), or has copied them all where it must
share none. Every mapping is private: whatever were written there would reach no other process. On a GPU a worker may
borrow its parameters (`models.lending`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models import ModelFailed, ModelNotFound, weights
from models.lending import BorrowedWeights
from models.sealing import SealedWeights
from models.stock import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    transformers_logging,
)
from models.tensors import map_tensors


def load_model(
    checkpoint: weights.Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    shared: SealedWeights | BorrowedWeights | None = None,
    own: bool = False,
) -> Qwen2_5_VLForConditionalGeneration:
    """The stock model with the checkpoint's weights on `device`, in evaluation mode, without gradients.

    It attends by SDPA where its own forward is called. On a CPU the weights are those of a sealed
    `shared`, which the first caller fills and seals; on a GPU it is sealed with nothing in it. With `own` they are
    copies in this process's own memory: nothing else of them is mapped once it returns. Raises `ModelNotFound`
    where config.json is not a Qwen2.5-VL configuration, `ModelFailed` where the weights cannot be read, where one is
    missing, has another shape or belongs to no part of the model, and where `shared` holds another model's.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = _read_config(checkpoint)
    lent = shared.tensors(dtype) if isinstance(shared, BorrowedWeights) else {}
    try:
        tensors = _stand_in(lent) if lent else _open(checkpoint, device, dtype, shared, own=own)
        model: Any
        loaded: dict[str, Any]
        model, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(  # type: ignore[misc]
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as exc:  # transformers, safetensors and torch each raise errors of their own
        raise ModelFailed(f"the weights of model {checkpoint.name!r} cannot be loaded") from exc
    # transformers fills a missing weight with random numbers and goes on; a reranker must not.
    if any(loaded[keys] for keys in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs")):
        raise ModelFailed(f"the weights of model {checkpoint.name!r} are not whole, or not its own")
    if lent:
        _replace(model, tensors, lent)
    whole: Qwen2_5_VLForConditionalGeneration = model.to(device).eval().requires_grad_(False)
    return whole


def _read_config(checkpoint: weights.Checkpoint) -> Any:
    try:
        config: Any = Qwen2_5_VLConfig.from_dict(checkpoint.json("config.json"))
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
    shared: SealedWeights | BorrowedWeights | None,
    *,
    own: bool,
) -> dict[str, Tensor]:
    """The checkpoint's tensors as they are to be mapped, by the names of its files."""
    tensors = map_tensors(checkpoint.weights())
    if own and device.type == "cpu":
        # One after the other, so that no more than one is held twice.
        return {name: tensors.pop(name).to(dtype, copy=True) for name in list(tensors)}
    if own or not isinstance(shared, SealedWeights):
        return tensors
    if device.type != "cpu":
        shared.fill({}, dtype, {})  # so that nobody else can fill it
        return tensors
    hashes = checkpoint.weight_hashes
    shared.fill(tensors, dtype, hashes)
    tensors = map_tensors([shared.path])
    if shared.hashes() != hashes or any(tensor.dtype != dtype for tensor in tensors.values()):
        raise ModelFailed("the shared weights are others than those asked for")
    return tensors


def _stand_in(lent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each tensor one of its shape and dtype that takes no memory, and that is known by its address.

    The library would copy a device's tensors to the CPU; where it puts which is its business all the same.
    """
    return {name: torch.empty(1, dtype=tensor.dtype).expand(tensor.shape) for name, tensor in lent.items()}


def _replace(model: torch.nn.Module, stand_ins: Mapping[str, Tensor], lent: Mapping[str, Tensor]) -> None:
    """Put every lent tensor where its stand-in was put. Raises `ModelFailed` where a parameter is none of them."""
    parameters = {
        stand_in.data_ptr(): torch.nn.Parameter(lent[name], requires_grad=False)
        for name, stand_in in stand_ins.items()
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            found = parameters.get(parameter.data_ptr())  # the same for a tied head and its embedding
            if found is None or found.shape != parameter.shape:
                raise ModelFailed(f"parameter {name!r} of the model is none of the lent tensors")
            setattr(module, name, found)
