"""What the benches compare with: the stock transformers model, called as its users call it, and jobs to score."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from models import Item, Job, Pixels
from models.images import ImagePreparer
from models.prompt import Prompt
from models.stock import Qwen2_5_VLForConditionalGeneration

CANDIDATES = 32
CANDIDATE_TOKENS = (26, 206)
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


class Stock:
    """The stock model, called as its users call it. `score` gives margins in the order of the candidates."""

    def __init__(self, model: Any, prompt: Prompt, preparer: ImagePreparer) -> None:
        self.model = model
        self.prompt = prompt
        self.preparer = preparer
        self.padding = prompt.controls["<|endoftext|>"]

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype) -> Stock:
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        ).eval()  # type: ignore[no-untyped-call]
        vision = model.config.vision_config
        preparer = ImagePreparer.load(
            directory,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
        )
        return cls(model, Prompt.load(directory), preparer)

    @torch.inference_mode()
    def score(self, job: Job, batch: int) -> list[float]:
        images = dict.fromkeys(item.image for item in (job.query, *job.candidates) if item.image is not None)
        patches = [self.preparer.prepare(image) for image in images]
        grids = {image: self.preparer.grid(image, number) for number, image in enumerate(images)}
        sheet = self.prompt.write(job, grids, context_tokens=1 << 20)
        device = self.model.device
        order = sorted(range(len(job.candidates)), key=lambda index: len(sheet.candidates[index]))
        margins = [0.0] * len(order)
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            rows = [[*sheet.prefix.ids, *sheet.candidates[index].ids] for index in chosen]
            longest = max(map(len, rows))
            ids = torch.tensor([[self.padding] * (longest - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
            shown = [
                patches[placed.grid.image]
                for index in chosen
                for placed in (*sheet.prefix.images, *sheet.candidates[index].images)
            ]
            more: dict[str, Tensor] = {}
            if shown:
                more = {
                    "pixel_values": torch.cat([each.values for each in shown]).to(device),
                    "image_grid_thw": torch.tensor([each.patch_grid for each in shown], device=device),
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
