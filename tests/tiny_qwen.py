"""A Qwen2.5-VL checkpoint of random weights, small enough for a unit test, with all of Qwen's control tokens.

Its shape is a real one in small: grouped key heads, windowed and full vision blocks, three rotary axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from models.stock import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
# Qwen's second kind: tokens that are added but not special, and so escape `split_special_tokens`.
ADDED = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Seams of the prompt appear often, so that merges across them are learned and a wrong cut would show.
CORPUS = [
    "yes no yes no system user assistant Judge whether the Document meets the requirements",
    "<Instruct>: given<Query>:what\n<Document>:text <Document>:(text) <Document>:\n\n <Document>:... >:) >:\n >:>",
    "Query>:(a) Query>:? Query>:\n im_start im_end image_pad tool_call <| |> 中文文档 红色的鞋 a red shoe?\n\n",
]


def make_tokenizer(pattern: str | None = PATTERN, corpus: Sequence[str] = CORPUS) -> Tokenizer:
    """Byte-level BPE under Qwen's pre-tokenizer (None: no splitting at all), control tokens behind the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([*corpus] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    return tokenizer


def make_config(tokenizer: Tokenizer, *, layers: int = 2, context_tokens: int = 4096) -> Qwen2_5_VLConfig:
    """Four heads over two key heads; five times the usual spread of weights, so that scores differ visibly."""
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context_tokens,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "patch_size": 14,
            "initializer_range": 0.1,
        },
        image_token_id=added["<|image_pad|>"],
        video_token_id=added["<|video_pad|>"],
        vision_start_token_id=added["<|vision_start|>"],
        vision_end_token_id=added["<|vision_end|>"],
    )


def save_checkpoint(directory: Path, *, context_tokens: int = 4096, poison: bool = False) -> Path:
    """Write the checkpoint to `directory`; `poison` makes one weight of its last layer not a number."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(make_config(tokenizer, context_tokens=context_tokens))
    if poison:
        with torch.no_grad():
            model.model.language_model.norm.weight[0] = float("nan")
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
