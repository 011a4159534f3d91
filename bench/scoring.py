"""Packed scoring beside what stock transformers offers, in one process, on the same model, inputs and threads.

    packed       QwenReranker.score: one shared prefix, no padding, last rows only
    padded       stock forward over left-padded batches of sorted lengths, SDPA, `logits_to_keep=1`; the best of
                 three batch sizes
    one_by_one   stock forward over one candidate at a time, as the reference does, but with `logits_to_keep=1`

All three write the same prompts and prepare the same images within their time. Methods take turns; figures are
medians; every method's scores are compared before its time counts.

    python bench/scoring.py [--quick] [--model NAME] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import Tensor

from models import DEMO, Item, Job, Pixels, weights
from models.images import ImagePreparer
from models.prompt import Prompt
from models.qwen import QwenReranker
from models.stock import Qwen2_5_VLForConditionalGeneration

CANDIDATES = 32
CANDIDATE_TOKENS = (26, 206)
BATCHES = (8, 16, 32)
TOLERANCE = {"fp32": 1e-4, "bf16": 0.5}
WORDS = (
    "red shoe",
    "price",
    "wooden table",
    "红色",
    "的",
    "鞋",
    "a dog",
    "near water,",
    "(new)",
    "2024.",
    "what is the",
)


@dataclass(frozen=True, slots=True)
class Case:
    """`prefix_tokens` is what was asked for; the prompt's own words set a floor."""

    name: str
    prefix_tokens: int
    query_image: bool = False
    candidate_images: int = 0


CASES = (
    Case("prefix_60", 60),
    Case("prefix_300", 300),
    Case("prefix_1000", 1000),
    Case("query_image", 100, query_image=True),
    Case("candidate_images", 100, candidate_images=16),
)
FULL = tuple((case, 7 if case.name == "prefix_300" else 3, BATCHES) for case in CASES)
FULL_BF16 = tuple((case, 3, BATCHES) for case in (CASES[1], CASES[3]))
# The smaller batches: they are the faster ones on a CPU, and the whole must end within 50 s on a busy machine.
QUICK = ((CASES[1], 3, (8,)), (CASES[3], 3, (8,)))


class Stock:
    """The stock model, called as its users call it. `score` gives margins in the order of the candidates."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        ).eval()  # type: ignore[no-untyped-call]
        vision = self.model.config.vision_config
        self.prompt = Prompt.load(directory)
        self.preparer = ImagePreparer(
            directory,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
        )
        self.padding = self.prompt.controls["<|endoftext|>"]

    @torch.inference_mode()
    def score(self, job: Job, batch: int) -> list[float]:
        items = (job.query, *job.candidates)
        patches = self.preparer.prepare(item.image for item in items if item.image is not None)
        grids = {pixels: each.grid for pixels, each in patches.items()}
        sheet = self.prompt.write(job, grids, context_tokens=1 << 20)
        shown = {each.grid.image: each for each in patches.values()}
        order = sorted(range(len(job.candidates)), key=lambda index: len(sheet.candidates[index]))
        margins = [0.0] * len(order)
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            rows = [[*sheet.prefix.ids, *sheet.candidates[index].ids] for index in chosen]
            longest = max(map(len, rows))
            ids = torch.tensor([[self.padding] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            images = [
                shown[placed.grid.image]
                for index in chosen
                for placed in (*sheet.prefix.images, *sheet.candidates[index].images)
            ]
            more: dict[str, Tensor] = {}
            if images:
                more = {
                    "pixel_values": torch.cat([each.values for each in images]),
                    "image_grid_thw": torch.tensor([each.patch_grid for each in images]),
                    "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
                }
            logits = self.model(
                input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False, **more
            ).logits
            answers = logits[:, -1, [self.prompt.yes, self.prompt.no]].float()
            for index, margin in zip(chosen, (answers[:, 0] - answers[:, 1]).tolist(), strict=True):
                margins[index] = margin
        return margins


def make_job(case: Case, prompt: Prompt, seed: int) -> Job:
    """Texts grown word by word until their segment has the tokens asked for."""
    rng = random.Random(seed)

    def grow(target: int, tokens: Callable[[str], int]) -> str:
        text = ""
        while tokens(text) < target:
            text = f"{text} {rng.choice(WORDS)}"
        return text

    def prefix_tokens(text: str) -> int:
        return len(prompt.write(Job(Item(text), ()), {}, context_tokens=1 << 20).prefix)

    def candidate_tokens(text: str) -> int:
        return len(prompt.write(Job(Item(""), (Item(text),)), {}, context_tokens=1 << 20).candidates[0])

    def image() -> Pixels:
        return Pixels(224, 168, rng.randbytes(224 * 168 * 3))

    least, most = CANDIDATE_TOKENS
    lengths = [least + (most - least) * place // (CANDIDATES - 1) for place in range(CANDIDATES)]
    rng.shuffle(lengths)
    candidates = tuple(
        Item(grow(length, candidate_tokens), image() if place < case.candidate_images else None)
        for place, length in enumerate(lengths)
    )
    return Job(
        Item(grow(case.prefix_tokens, prefix_tokens), image() if case.query_image else None), candidates
    )


def take_turns(methods: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each method; they take turns, so that a busy machine is unfair to none."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            began = time.perf_counter()
            method()
            times[name].append((time.perf_counter() - began) * 1000)
    return {name: statistics.median(taken) for name, taken in times.items()}


def run_case(
    case: Case, packed: QwenReranker, stock: Stock, rounds: int, batches: Sequence[int]
) -> dict[str, Any]:
    job = make_job(case, stock.prompt, seed=1)
    scores = packed.score(job)  # also the warm-up
    margins: dict[str, Sequence[float]] = {}

    def score(name: str, batch: int) -> Callable[[], object]:
        return lambda: margins.__setitem__(name, stock.score(job, batch))

    methods: dict[str, Callable[[], object]] = {
        "packed": lambda: packed.score(job),
        "one_by_one": score("one_by_one", 1),
    }
    methods |= {f"padded_{batch}": score(f"padded_{batch}", batch) for batch in batches}
    taken = take_turns(methods, rounds)
    best = min(batches, key=lambda batch: taken[f"padded_{batch}"])
    padded_ms = taken[f"padded_{best}"]

    def delta(name: str) -> float:
        return max(abs(a - b) for a, b in zip(scores.margins, margins[name], strict=True))

    return {
        "case": case.name,
        # The reference reads the prefix once per candidate, a job of distinct candidates computes it once.
        "prefix_tokens": (scores.input_tokens - scores.computed_tokens) // (CANDIDATES - 1),
        "reference_tokens": scores.input_tokens,
        "computed_tokens": scores.computed_tokens,
        "packed_ms": round(taken["packed"], 1),
        "padded_ms": round(padded_ms, 1),
        "padded_batch": best,
        "one_by_one_ms": round(taken["one_by_one"], 1),
        "speedup_over_padded": round(padded_ms / taken["packed"], 2),
        "speedup_over_one_by_one": round(taken["one_by_one"] / taken["packed"], 2),
        "max_abs_delta_z": delta("one_by_one"),
        "max_abs_delta_z_padded": delta(f"padded_{best}"),
    }


def aims_of(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fp32 = [each for each in figures if each["dtype"] == "fp32"]
    central = next(each for each in fp32 if each["case"] == "prefix_300")
    aims = [
        ("speed over a padded batch, 300-token prefix, fp32", 3.0, central["speedup_over_padded"]),
        ("speed over one by one, 300-token prefix, fp32", 3.0, central["speedup_over_one_by_one"]),
    ]
    worst = max(each["max_abs_delta_z"] for each in fp32)
    return [
        *({"what": what, "aim": f">= {aim}x", "measured": got, "ok": got >= aim} for what, aim, got in aims),
        {
            "what": "largest |dz| against one by one, fp32",
            "aim": f"<= {TOLERANCE['fp32']}",
            "measured": worst,
            "ok": worst <= TOLERANCE["fp32"],
        },
    ]


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two cases, fp32, within 50 s")
    parser.add_argument("--model", default=DEMO)
    parser.add_argument(
        "--threads", type=int, default=1, help="more than the free cores is far slower than one"
    )
    options = parser.parse_args()
    directory = weights.find(options.model).directory
    figures = []
    card = None
    for dtype in ("fp32",) if options.quick else ("fp32", "bf16"):
        packed = QwenReranker.load(options.model, device="cpu", dtype=dtype, threads=options.threads)
        card = packed.card
        stock = Stock(directory, torch.float32 if dtype == "fp32" else torch.bfloat16)
        for case, rounds, batches in QUICK if options.quick else FULL if dtype == "fp32" else FULL_BF16:
            began = time.perf_counter()
            figure = run_case(case, packed, stock, rounds, batches)
            figures.append({"dtype": dtype, **figure})
            print(f"{dtype} {case.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    assert card is not None
    aims = aims_of(figures)
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    report = {
        "name": "scoring",
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": options.threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit,
        "quick": options.quick,
        "model": {"name": card.name, "digest": card.digest, "parameters": card.parameters},
        "figures": figures,
        "aims": aims,
    }
    print(json.dumps(report, indent=2))
    return 0 if all(aim["ok"] for aim in aims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
