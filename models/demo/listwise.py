"""Stage "listwise": the language model, which can compare from the start (comparator.py), learns to compare better.

A row's loss is the cross-entropy of a softmax over its candidates' margins (z_yes - z_no), and a smaller binary one
that sets where "yes" begins. The vision tower stands still; its tokens are computed once.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from models.demo.data import Corpus, pick_caption
from models.demo.model import UNIT, Model, Packed, Packer, autocast, encode_images
from models.demo.scenes import Scene, draw_family, list_things, paint_scene
from models.demo.views import augment_images, resize_images

CLEAN = (112, 112)
VIEWED = ((112, 112), (84, 84), (84, 112), (112, 84))  # height and width in pixels of an augmented view
ROWS, CANDIDATES = 8, 16
BINARY = 0.15  # weight of the binary term
HARD = 0.2  # share of negatives from the right answer's own group
FAMILIES = 300  # of composed scenes
MIX = {
    "same": 0.02, "words": 0.10, "gloss": 0.10, "passage": 0.07, "show": 0.29, "tell": 0.14,
    "alike": 0.08, "mixed": 0.08, "keyword": 0.06, "both": 0.03, "scene": 0.03,
}  # fmt: skip


class Views:
    """Visual tokens of `images` and of scenes, computed once by a tower that stands still: one view each."""

    def __init__(
        self, model: Model, corpus: Corpus, images: Sequence[int], scenes: Sequence[Scene], seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        self._device = model.device.type
        self._kept: dict[int, Tensor] = {}
        self._grid: dict[int, tuple[int, int]] = {}
        clean = {image for image in images if rng.random() < 0.5}
        for part in _split(sorted(clean), 256):
            self._keep(model, part, resize_images(corpus.pixels[part], *CLEAN))
        for number, part in enumerate(_split(sorted(set(images) - clean), 256)):
            pixels, _ = augment_images(corpus, part, *VIEWED[number % len(VIEWED)], generator, scenes=False)
            self._keep(model, part, pixels)
        for part in _split(range(len(scenes)), 256):
            painted = np.stack([paint_scene(corpus, scenes[i]) for i in part])
            self._keep(model, part + len(corpus.concept_of), resize_images(painted, *CLEAN))

    def measure(self, image: int) -> tuple[int, int]:
        """Height and width of the kept view, in visual tokens."""
        return self._grid[image]

    def gather(self, packed: Packed) -> Tensor:
        """The visual tokens of `packed.slots`, in order. [slots, hidden]"""
        parts = [self._kept[image] for image in packed.images]
        return torch.cat(parts) if parts else torch.zeros(0, device=self._device)

    @torch.no_grad()
    def _keep(self, model: Model, numbers: NDArray[np.int64], pixels: Tensor) -> None:
        with autocast(self._device):
            tokens = encode_images(model, pixels.to(self._device))
        grid = pixels.shape[2] // UNIT, pixels.shape[3] // UNIT
        for number, kept in zip(numbers.tolist(), tokens.float(), strict=True):
            self._kept[number], self._grid[number] = kept, grid


@dataclass(slots=True)
class Meter:
    """Means since the last report, of all rows and by task."""

    losses: list[float] = field(default_factory=list)
    hits: dict[str, list[float]] = field(default_factory=dict)

    def add(self, task: str, loss: float, hit: float) -> None:
        self.losses.append(loss)
        self.hits.setdefault(task, []).append(hit)

    def take(self) -> dict[str, float]:
        every = [hit for hits in self.hits.values() for hit in hits]
        means = {"loss": round(float(np.mean(self.losses)), 4), "acc": round(float(np.mean(every)), 4)}
        means |= {task: round(float(np.mean(hits)), 3) for task, hits in sorted(self.hits.items())}
        self.losses, self.hits = [], {}
        return means


def draw_families(corpus: Corpus, seed: int) -> list[list[Scene]]:
    """Families of scenes of training images."""
    rng = random.Random(seed)
    trained = corpus.train_images.tolist()
    photos = [i for i in trained if corpus.concepts[corpus.concept_of[i]].kind == "photo"]
    things = list_things(corpus, trained)
    return [draw_family(corpus, things, photos, rng) for _ in range(FAMILIES)]


def choose_images(corpus: Corpus, seed: int, most: int = 4) -> list[int]:
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
    """Take from visual tokens what all images have in common, and give them the size of word embeddings."""
    sample = corpus.train_images[np.linspace(0, len(corpus.train_images) - 1, 1024).astype(int)]
    with torch.no_grad():
        pixels = resize_images(corpus.pixels[sample], *CLEAN).to(model.device)
        tokens = torch.cat([encode_images(model, part) for part in torch.split(pixels, 128)]).flatten(0, 1)
        common = tokens.mean(0)
        model.model.visual.merger.mlp[2].bias.sub_(common)
        size = (tokens - common).pow(2).mean().sqrt()
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
    named = [concept for concept in corpus.concepts if not concept.held]
    captions = [packer.read(pick_caption(rng.choice(named), rng)) for _ in range(3000)]
    with torch.no_grad():
        texts = torch.stack([table[torch.tensor(ids, device=table.device)].mean(0) for ids in captions])
        parts = [
            resize_images(corpus.pixels[part], *CLEAN).to(model.device)
            for part in _split(images.tolist(), 100)
        ]
        seen = torch.cat([encode_images(model, part).mean(1) for part in parts])
    return torch.cat([functional.normalize(texts, dim=1), functional.normalize(seen, dim=1).repeat(5, 1)])


def compute_list_loss(margins: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """Loss, and each row's hit or miss, of margins [rows, candidates]; labels are 1, 0, or -1 where there is no candidate."""
    there = labels >= 0
    right = labels.clamp_min(0)
    listed = margins.masked_fill(~there, -1e4).log_softmax(1)
    loss = -(right * listed).sum(1) / right.sum(1)
    binary = functional.binary_cross_entropy_with_logits(margins, right, reduction="none")
    best = margins.masked_fill(~there, -1e4).argmax(1, keepdim=True)
    hits: list[float] = right.gather(1, best).flatten().tolist()
    return (loss + BINARY * (binary * there).sum(1)).mean(), hits
