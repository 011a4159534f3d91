"""The real 7B and 3B shapes on a GPU, with random weights: pairs/s, tokens/s, share of the matrix peak.

    packed       the product's engine: FlexAttention over one shared prefix, the yes-no head alone
    one_by_one   the stock model over one candidate at a time, SDPA, `logits_to_keep=1`
    padded       the stock model over left-padded batches of sorted lengths; the best of three batch sizes

    python tests/gpu/bench_qwen.py [--shape 7b|3b|tiny] [--device cuda] [--rounds N]

Random weights compute as fast as trained ones. `--shape tiny --device cpu` shows on any machine that the script runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import transformers

from bench.stock import Stock
from models import Item, Job, ModelCard
from models.engine import Limits
from models.images import ImagePreparer
from models.prompt import Prompt
from models.qwen import CPU_PACK_TOKENS, GPU_PACK_TOKENS, Qwen, QwenReranker
from models.stock import Qwen2_5_VLForConditionalGeneration
from tests.tiny_qwen import make_config, make_tokenizer

CANDIDATES, CANDIDATE_TOKENS, PREFIX_TOKENS = 100, 300, 100
BATCHES = (4, 16, 32)
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    | {"num_attention_heads": 16, "num_key_value_heads": 2},
    "tiny": {},
}
ROTATION = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Prompt]:
    """The shape's language model with random weights; its vision tower stays small, for it is not measured here."""
    tokenizer = make_tokenizer()
    config: Any = make_config(tokenizer, context_tokens=32_768)
    if SHAPES[shape]:
        text = config.text_config
        for name, value in (SHAPES[shape] | {"vocab_size": 152_064, "rope_parameters": ROTATION}).items():
            setattr(text, name, value)
        text.layer_types = ["full_attention"] * text.num_hidden_layers
        config.vision_config.out_hidden_size = text.hidden_size
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    return model.train(mode=False).requires_grad_(False), Prompt(tokenizer.to_str())


def make_job(prompt: Prompt, seed: int) -> Job:
    rng = random.Random(seed)

    def grow(target: int, tokens: Callable[[str], int]) -> str:
        words = [rng.choice(("red shoe", "a text", "红色的鞋", "document")) for _ in range(target // 8)]
        while tokens(" ".join(words)) < target:
            words.append(rng.choice(("red", "given", "Query", "what")))
        return " ".join(words)

    def candidate_tokens(text: str) -> int:
        return len(prompt.write(Job(Item(""), (Item(text),)), {}, context_tokens=1 << 20).candidates[0])

    def prefix_tokens(text: str) -> int:
        return len(prompt.write(Job(Item(text), ()), {}, context_tokens=1 << 20).prefix)

    lengths = [rng.randint(CANDIDATE_TOKENS - 60, CANDIDATE_TOKENS + 60) for _ in range(CANDIDATES)]
    candidates = tuple(Item(grow(length, candidate_tokens)) for length in lengths)
    return Job(Item(grow(PREFIX_TOKENS, prefix_tokens)), candidates)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large product, the best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize(device)
        best = max(best, 5 * 2 * side**3 / (time.perf_counter() - began) / 1e12)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), torch.bfloat16
    on_gpu = device.type == "cuda"
    model, prompt = make_model(options.shape, device, dtype)
    preparer = ImagePreparer({}, patch=14, merge=2, temporal_patch=2)
    form = "flex" if on_gpu else "cascade"
    qwen = Qwen(model, prompt, preparer, form="flex" if on_gpu else "cascade")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    card = ModelCard(options.shape, "random", parameters, "bf16", options.device, form, 32_768)
    pack_tokens = GPU_PACK_TOKENS if on_gpu else CPU_PACK_TOKENS
    packed = QwenReranker(qwen, card, Limits(threads=1, pack_tokens=pack_tokens))
    stock = Stock(model, prompt, preparer)

    job = make_job(prompt, 1)
    scores = packed.score(job)
    compiled = packed.compilations
    taken: dict[str, list[float]] = {}
    methods: dict[str, Callable[[], object]] = {"packed": partial(packed.score, job)}
    methods["one_by_one"] = partial(stock.score, job, 1)
    for batch in BATCHES:
        methods[f"padded_{batch}"] = partial(stock.score, job, batch)
    margins = stock.score(job, 1)
    for _ in range(options.rounds):
        for name, method in methods.items():
            synchronize(device)
            began = time.perf_counter()
            method()
            synchronize(device)
            taken.setdefault(name, []).append(time.perf_counter() - began)
    took_s = {name: statistics.median(each) for name, each in taken.items()}
    padded_s = min(each for name, each in took_s.items() if name.startswith("padded"))

    text = model.config.text_config
    layers: Any = model.model.language_model.layers
    per_token = 2 * sum(each.numel() for name, each in layers.named_parameters() if each.dim() == 2)
    peak = measure_peak(device, dtype)
    rate = per_token * scores.computed_tokens / took_s["packed"] / 1e12
    speed_one, speed_padded = took_s["one_by_one"] / took_s["packed"], padded_s / took_s["packed"]
    aims = [
        ("share of the measured bf16 matrix peak", 0.5, rate / peak),
        ("speed over one by one", 3.0, speed_one),
        ("speed over a left-padded batch", 1.5, speed_padded),
    ]
    report: dict[str, Any] = {
        "name": f"qwen_{options.shape}_{device.type}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"device": torch.cuda.get_device_name(device) if on_gpu else platform.processor()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip(),
        "model": {"shape": options.shape, "parameters": parameters, "layers": text.num_hidden_layers},
        "figures": {
            "milliseconds": {name: round(each * 1000, 1) for name, each in took_s.items()},
            "pairs_per_s": round(CANDIDATES / took_s["packed"], 1),
            "tokens_per_s": round(scores.computed_tokens / took_s["packed"]),
            "computed_tokens": scores.computed_tokens,
            "reference_tokens": scores.input_tokens,
            "tflops_per_s": round(rate, 2),
            "matrix_peak_tflops_per_s": round(peak, 2),
            "max_abs_delta_z": max(abs(a - b) for a, b in zip(scores.margins, margins, strict=True)),
            "compilations_warm": compiled,
            "compilations_after": packed.compilations,
        },
        "aims": [
            {"what": what, "aim": f">= {aim}", "measured": round(got, 3), "ok": got >= aim}
            for what, aim, got in aims
        ],
    }
    print(json.dumps(report, indent=2))
    return 0 if all(aim["ok"] for aim in report["aims"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
