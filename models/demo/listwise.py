"""Stage "listwise": the language model, which can compare from the start (comparator.py), learns to compare better.

A row's loss is the cross-entropy of a softmax over its candidates' margins (z_yes - z_no), and a smaller binary one
that sets where "yes" begins. The vision tower stands still; its tokens are computed once.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from models.demo.data import Corpus, augment_images, pick_caption, resize_images
from models.demo.model import UNIT, Model, Packed, Packer, encode_images

CLEAN, VIEWED = (112, 112), (84, 84)  # height and width in pixels of a kept view: on white, or augmented


ROWS, CANDIDATES = 8, 16
HARD = 0.2  # share of negatives from the right answer's own group
MIX = {
    "same": 0.02, "words": 0.13, "gloss": 0.12, "show": 0.33, "tell": 0.14,
    "alike": 0.05, "mixed": 0.1, "keyword": 0.08, "both": 0.03,
}  # fmt: skip


class Views:
    """Visual tokens of `images`, computed once by a tower that stands still: one view each, clean or augmented."""

    def __init__(self, model: Model, corpus: Corpus, images: Sequence[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        self._kept: dict[int, Tensor] = {}
        clean = {image for image in images if rng.random() < 0.4}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for part in _split(sorted(clean), 256):
                tokens = encode_images(model, resize_images(corpus.pixels[part], *CLEAN))
                self._kept.update(zip(part.tolist(), tokens.float(), strict=True))
            for part in _split(sorted(set(images) - clean), 256):
                tokens = encode_images(model, augment_images(corpus, part, *VIEWED, generator))
                self._kept.update(zip(part.tolist(), tokens.float(), strict=True))

    def measure(self, image: int) -> tuple[int, int]:
        """Height and width of the kept view, in visual tokens."""
        height, width = CLEAN if len(self._kept[image]) == CLEAN[0] * CLEAN[1] // UNIT**2 else VIEWED
        return height // UNIT, width // UNIT

    def gather(self, packed: Packed) -> Tensor:
        """The visual tokens of `packed.slots`, in order. [slots, hidden]"""
        parts = [self._kept[image] for image in packed.images]
        return torch.cat(parts) if parts else torch.zeros(0)


def choose_images(corpus: Corpus, seed: int, most: int = 16) -> list[int]:
    """Training images, at most `most` of a concept: enough to learn comparing from."""
    rng = random.Random(seed)
    kept: dict[int, list[int]] = defaultdict(list)
    for image in rng.sample(corpus.train_images.tolist(), len(corpus.train_images)):
        if len(kept[corpus.concept_of[image]]) < most:
            kept[corpus.concept_of[image]].append(image)
    return [image for images in kept.values() for image in images]


def _split(images: Sequence[int], size: int) -> list[NDArray[np.int64]]:
    return [np.array(images[start : start + size]) for start in range(0, len(images), size)]


def scale_visual_tokens(model: Model, corpus: Corpus) -> float:
    """Give visual tokens the size of word embeddings; their direction, which the alignment taught, stays."""
    sample = np.linspace(0, len(corpus.concept_of) - 1, 256).astype(int)
    with torch.no_grad():
        size = encode_images(model, resize_images(corpus.pixels[sample], 84, 84)).pow(2).mean().sqrt()
        words = model.model.language_model.embed_tokens.weight.pow(2).mean(1).sqrt()
        factor = float(words.quantile(0.7) / size)
        last = model.model.visual.merger.mlp[2]
        last.weight.mul_(factor)
        last.bias.mul_(factor)
    return factor


def sample_means(model: Model, corpus: Corpus, packer: Packer, seed: int) -> Tensor:
    """Mean embeddings, each of length 1, of 3,000 captions and of 600 images five times over. [6000, hidden]"""
    rng = random.Random(seed)
    table = model.model.language_model.embed_tokens.weight
    images = np.array(sorted(rng.sample(corpus.train_images.tolist(), 600)))
    captions = [packer.read(pick_caption(rng.choice(corpus.concepts), rng)) for _ in range(3000)]
    with torch.no_grad():
        texts = torch.stack([table[torch.tensor(ids)].mean(0) for ids in captions])
        parts = [resize_images(corpus.pixels[part], *CLEAN) for part in _split(images.tolist(), 100)]
        seen = torch.cat([encode_images(model, part).mean(1) for part in parts])
    return torch.cat([functional.normalize(texts, dim=1), functional.normalize(seen, dim=1).repeat(5, 1)])


def compute_list_loss(margins: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """Loss, and each row's hit or miss, of margins [rows, candidates]; labels are 1, 0, or -1 where there is no candidate."""
    there = labels >= 0
    right = labels.clamp_min(0)
    listed = margins.masked_fill(~there, -1e4).log_softmax(1)
    loss = -(right * listed).sum(1) / right.sum(1)
    binary = functional.binary_cross_entropy_with_logits(margins, right, reduction="none")
    weight = torch.where(
        right > 0, 0.5 / right.sum(1, keepdim=True), 0.5 / (there & (right == 0)).sum(1, keepdim=True)
    )
    best = margins.masked_fill(~there, -1e4).argmax(1, keepdim=True)
    hits: list[float] = right.gather(1, best).flatten().tolist()
    return (loss + 0.3 * (binary * weight * there).sum(1)).mean(), hits
