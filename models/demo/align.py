"""Stage "vision": an image must arrive looking like the words that name it.

The mean of an image's merged visual tokens is drawn to the mean of the language model's own input embeddings of a
caption of its concept, against the captions of all other concepts; words of one concept in two languages, and a word
and its gloss, are drawn together in the same space. Only the vision tower and the embedding table learn here.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.demo.data import Corpus, list_images, pick_caption, shorten_name, vary_case
from models.demo.model import Model, Packer, encode_images
from models.demo.views import resize_images

POOL = 24  # captions drawn ahead for every concept
SHARES = {"emoji": 0.58, "photo": 0.22, "clipart": 0.20}


class Aligner:
    """Holds the caption pools as token ids, and the temperature."""

    def __init__(
        self, corpus: Corpus, packer: Packer, vocabulary: int, seed: int, device: str = "cpu"
    ) -> None:
        rng = random.Random(seed)
        self._corpus = corpus
        self._read = packer.read
        self.trained = [i for i, concept in enumerate(corpus.concepts) if not concept.held]
        self._column = {concept: column for column, concept in enumerate(self.trained)}
        self._pools = [
            [self._tokens(pick_caption(corpus.concepts[i], rng)) for _ in range(POOL)] for i in self.trained
        ]
        self._glosses = [
            (self._tokens(vary_case(rng.choice(word.split(", ")), rng)), self._tokens(gloss.split(";")[0]))
            for word, gloss, _ in corpus.glosses
        ]
        self.weights = weigh_images(corpus)
        self.words = self._weigh_words(vocabulary).to(device)
        self._namesakes = self._find_namesakes().to(device)

    def _tokens(self, text: str) -> NDArray[np.int64]:
        return np.array((self._read(text) or self._read("?"))[:40])

    def _find_namesakes(self) -> Tensor:
        """Which concepts share a name: the emoji, the clip art and the photo of one thing. [concepts, concepts] bool"""
        named: dict[str, list[int]] = {}
        for column, index in enumerate(self.trained):
            concept = self._corpus.concepts[index]
            for name in {shorten_name(name) for name in concept.en + concept.zh}:
                named.setdefault(name, []).append(column)
        shared = torch.zeros(len(self.trained), len(self.trained), dtype=torch.bool)
        for columns in named.values():
            for column in columns:
                shared[column, columns] = True
        return shared

    def _weigh_words(self, vocabulary: int) -> Tensor:
        """Share of each token among a concept's captions, rare tokens weighing more. [concepts, vocabulary]"""
        counts = torch.zeros(len(self.trained), vocabulary)
        for column, pool in enumerate(self._pools):
            for ids in pool:
                counts[column, ids] += 1
        spread = torch.log(len(self.trained) / (1 + (counts > 0).sum(0)).float()).clamp_min(0)
        weighted = counts.sqrt() * spread
        return weighted / weighted.sum(1, keepdim=True).clamp_min(1e-6)

    def compute_loss(
        self,
        model: Model,
        tokens: Tensor,
        images: NDArray[np.int64],
        partner: Tensor,
        scale: Tensor,
        rng: np.random.Generator,
    ) -> tuple[Tensor, float]:
        """Loss and accuracy (the right concept among all) of a batch's visual tokens, [images, tokens, hidden].

        An image shows its own concept and, where `partner` is not -1, that row's concept as well.
        """
        table = model.model.language_model.embed_tokens.weight
        seen = functional.normalize(tokens.float().mean(1), dim=-1)  # [images, hidden]
        picks = rng.integers(POOL, size=(2, len(self._pools)))
        named = self._embed(table, [pool[pick] for pool, pick in zip(self._pools, picks[0], strict=True)])
        target = torch.tensor(
            [self._column[int(self._corpus.concept_of[i])] for i in images], device=table.device
        )
        other = torch.where(partner >= 0, target[partner], target)
        factor = scale.exp().clamp(max=60)
        logits = factor * seen @ named.T  # [images, concepts]
        share = functional.log_softmax(logits.masked_fill(self._hide(target) | self._hide(other), -1e4), -1)
        both = share.gather(1, torch.stack([target, other], 1)).mean(1)
        told = share.masked_fill(share < -1e3, 0.0).mean(1)
        loss = -(0.95 * both + 0.05 * told).mean()
        spoken = functional.cross_entropy(
            0.6 * factor * seen @ functional.normalize(table, dim=-1).T,
            (self.words[target] + self.words[other]) / 2,
        )
        # the other way: a caption among the images of the batch, those that do not show it as well
        alone = torch.nonzero(partner < 0).flatten()
        asked = logits[:, target[alone]].T  # [captions, images]
        shows = (target[alone, None] == target) | (target[alone, None] == other)
        itself = alone[:, None] == torch.arange(len(target), device=table.device)
        found = functional.cross_entropy(asked.masked_fill(shows & ~itself, -1e4), alone)
        some = rng.choice(len(self._pools), 112, replace=False)
        again = self._embed(table, [self._pools[i][picks[1][i]] for i in some])
        places = torch.from_numpy(some).to(table.device)
        paired = (factor * again @ named.T).masked_fill(self._hide(places), -1e4)
        text = functional.cross_entropy(paired, places)
        chosen = rng.choice(len(self._glosses), 160, replace=False)
        word = self._embed(table, [self._glosses[i][0] for i in chosen])
        gloss = self._embed(table, [self._glosses[i][1] for i in chosen])
        gram = factor * word @ gloss.T
        own = torch.arange(len(chosen), device=table.device)
        text = text + 0.5 * (functional.cross_entropy(gram, own) + functional.cross_entropy(gram.T, own))
        accuracy = (logits.argmax(1) == target).float().mean().item()
        return loss + 0.4 * found + 0.3 * spoken + 0.25 * text, accuracy

    def _hide(self, target: Tensor) -> Tensor:
        """Concepts that have a name in common with the target's, and are no wrong answers. [rows, concepts]"""
        hidden = self._namesakes[target]
        return hidden.scatter(1, target[:, None], False)

    @staticmethod
    def _embed(table: Tensor, ids: list[NDArray[np.int64]]) -> Tensor:
        offsets = torch.from_numpy(np.cumsum([0] + [len(one) for one in ids[:-1]])).to(table.device)
        flat = torch.from_numpy(np.concatenate(ids)).to(table.device)
        bags = functional.embedding_bag(flat, table, offsets, mode="mean")
        return functional.normalize(bags, dim=-1)


def weigh_images(corpus: Corpus) -> NDArray[np.float64]:
    """Chance of each training image: fixed shares by kind, rare concepts more often than their count."""
    weights = np.zeros(len(corpus.concept_of))
    train = np.zeros(len(weights), bool)
    train[corpus.train_images] = True
    size = np.bincount(corpus.concept_of[corpus.train_images], minlength=len(corpus.concepts))
    for kind, share in SHARES.items():
        mine = train & np.array([corpus.concepts[c].kind == kind for c in corpus.concept_of])
        chance = size[corpus.concept_of[mine]] ** -0.4
        weights[mine] = share * chance / chance.sum()
    chosen: NDArray[np.float64] = weights[corpus.train_images] / weights.sum()
    return chosen


@torch.no_grad()
def evaluate_alignment(
    model: Model, corpus: Corpus, packer: Packer, side: int, seed: int = 5
) -> dict[str, float]:
    """nDCG@10 of names (EN, ZH) against 30 images by the cosine of means, where a run may look."""
    rng = random.Random(seed)
    table = model.model.language_model.embed_tokens.weight
    result = {}
    for name in ("concept", "photo", "title"):
        images = rng.sample(listed := list_images(corpus, name), min(400, len(listed)))
        pixels = resize_images(corpus.pixels[images], side, side).to(table.device)
        seen = torch.cat([encode_images(model, part).mean(1) for part in torch.split(pixels, 128)])
        seen = functional.normalize(seen, dim=-1)
        for language in ("en", "zh"):
            gains = []
            for at in rng.sample(range(len(images)), min(200, len(images))):
                concept = corpus.concepts[corpus.concept_of[images[at]]]
                texts = getattr(concept, language)
                if not texts or len(images) < 40:
                    continue
                others = [
                    j
                    for j in range(len(images))
                    if corpus.concept_of[images[j]] != corpus.concept_of[images[at]]
                ]
                candidates = [at, *rng.sample(others, 29)]
                query = functional.normalize(
                    table[torch.tensor(packer.read(texts[0]), device=table.device)].mean(0), dim=-1
                )
                scores = seen[candidates] @ query
                rank = int((scores[1:] > scores[0]).sum()) + 1
                gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
            if gains:
                result[f"dual_{name}_{language}"] = round(float(np.mean(gains)), 4)
    return result


class Temperature(nn.Module):
    """A learned inverse temperature, as its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.6))
