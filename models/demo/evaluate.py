"""Measure the demo model: `python -m models.demo.evaluate` prints nDCG@10 and R@1 by task and language.

Every query has 30 candidates of which one is right, so a random order has nDCG@10 = 0.15 and R@1 = 0.03. The drawing
style of `fxemoji` was never trained on, nor were 5 % of the emoji concepts in any style.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from models.demo.data import HELD_VENDOR, Corpus, load_corpus, resize_images
from models.demo.model import Entry, Model, Packer, Row, encode_images, score_rows

CANDIDATES = 30


def measure_rank(margins: Sequence[float]) -> tuple[float, float]:
    """nDCG@10 and R@1 where the first candidate alone is right; ties count against it."""
    rank = sum(margin >= margins[0] for margin in margins[1:]) + 1
    return (1 / math.log2(1 + rank) if rank <= 10 else 0.0), float(rank == 1)


def draw_rows(
    corpus: Corpus, task: str, language: str, images: list[int], queries: int, seed: int
) -> list[Row]:
    """Rows of 30 candidates, the right one first. Tasks: show, tell, alike (needs a second image), words."""
    rng = random.Random(f"{task}/{language}/{seed}")
    usable = [i for i in images if getattr(corpus.concepts[corpus.concept_of[i]], language)]
    rows = []
    for image in rng.sample(usable, min(queries, len(usable))):
        concept = corpus.concept_of[image]
        names = set(getattr(corpus.concepts[concept], language)[:1])
        others = [
            i
            for i in usable
            if corpus.concept_of[i] != concept and not names & set(_name(corpus, i, language))
        ]
        chosen = _draw_distinct(corpus, others, rng)
        if len(chosen) < CANDIDATES - 1:
            continue
        shown = [image, *chosen]
        texts = [Entry(_name(corpus, i, language)[0]) for i in shown]
        pictures = [Entry(image=i) for i in shown]
        if task == "show":
            rows.append(Row(texts[0], tuple(pictures), (), task=task))
        elif task == "tell":
            rows.append(Row(pictures[0], tuple(texts), (), task=task))
        elif task == "alike":
            twins = [
                i for i in corpus.concepts[concept].images if corpus.source_of[i] != corpus.source_of[image]
            ]
            if twins:
                rows.append(Row(Entry(image=rng.choice(twins)), tuple(pictures), (), task=task))
        else:
            other = "zh" if language == "en" else "en"
            if getattr(corpus.concepts[concept], other):
                rows.append(Row(Entry(_name(corpus, image, other)[0]), tuple(texts), (), task=task))
    return rows


@torch.no_grad()
def score_all(
    model: Model, corpus: Corpus, packer: Packer, rows: Sequence[Row], side: int = 112
) -> list[list[float]]:
    """Margins of each row's candidates, in order, with images of `side` x `side` pixels."""
    images = sorted({e.image for row in rows for e in (row.query, *row.candidates) if e.image is not None})
    known: dict[int, torch.Tensor] = {}
    for start in range(0, len(images), 128):
        part = images[start : start + 128]
        known.update(
            zip(part, encode_images(model, resize_images(corpus.pixels[part], side, side)), strict=True)
        )
    found = []
    for start in range(0, len(rows), 4):
        packed = packer.pack(rows[start : start + 4], lambda _: (side // 28, side // 28))
        visual = torch.cat([known[i] for i in packed.images]) if packed.images else torch.zeros(0, 256)
        margins = score_rows(model, packed, visual, packer.answers)
        found += [
            m[: len(row.candidates)].tolist() for row, m in zip(rows[start : start + 4], margins, strict=True)
        ]
    return found


def list_images(corpus: Corpus, split: str) -> list[int]:
    """style: the vendor never trained on. concept: emoji of two vendors, concepts never trained on. seen: trained on."""
    concepts = corpus.concepts
    tests: dict[str, Callable[[int], bool]] = {
        "style": lambda i: corpus.source_of[i] == HELD_VENDOR and not concepts[corpus.concept_of[i]].held,
        "concept": lambda i: (
            corpus.source_of[i] in ("twemoji", "noto") and concepts[corpus.concept_of[i]].held
        ),
        "seen": lambda i: corpus.source_of[i] == "twemoji" and not concepts[corpus.concept_of[i]].held,
        "photo": lambda i: concepts[corpus.concept_of[i]].kind == "photo",
    }
    return [i for i in range(len(corpus.concept_of)) if tests[split](i)]


def score_briefly(model: Model, corpus: Corpus, packer: Packer) -> dict[str, float]:
    """nDCG@10 of the few tasks that a training run watches."""
    result = {}
    for split, task, language, queries in (
        ("style", "show", "en", 48), ("style", "show", "zh", 32), ("concept", "show", "en", 24),
        ("style", "tell", "en", 16), ("style", "words", "en", 16), ("photo", "show", "en", 24),
    ):  # fmt: skip
        rows = draw_rows(corpus, task, language, list_images(corpus, split), queries, 3)
        scores = score_all(model, corpus, packer, rows)
        result[f"{split}_{task}_{language}"] = round(float(np.mean([measure_rank(s)[0] for s in scores])), 4)
    return result


def measure_all(
    model: Model, corpus: Corpus, tokenizer: Tokenizer, queries: int, seed: int
) -> list[dict[str, str | int | float]]:
    """One line per split, task and language."""
    packer = Packer(tokenizer)
    lines: list[dict[str, str | int | float]] = []
    for split, tasks in _MEASURED.items():
        images = list_images(corpus, split)
        for task in tasks:
            for language in ("en", "zh"):
                rows = draw_rows(corpus, task, language, images, queries, seed)
                if not rows:
                    continue
                ranks = [measure_rank(s) for s in score_all(model, corpus, packer, rows)]
                ndcg, first = (round(float(np.mean(column)), 3) for column in zip(*ranks, strict=True))
                lines.append(
                    {
                        "split": split,
                        "task": task,
                        "language": language,
                        "queries": len(rows),
                        "ndcg10": ndcg,
                        "r1": first,
                    }
                )
    return lines


def main(arguments: list[str] | None = None) -> int:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        prog="python -m models.demo.evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--data", type=Path, default=here.parents[1].parent / "shared/data/train",
                        help="folder of image_text.jsonl.gz and the zips (default: ../shared/data/train)")  # fmt: skip
    parser.add_argument("--weights", type=Path, default=here / "weights", help="a checkpoint directory")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo"), help="decoded images are kept here")
    parser.add_argument("--queries", type=int, default=200, help="queries of each line (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="draws queries and candidates (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(2)
    corpus = load_corpus(chosen.data, chosen.cache)
    tokenizer = Tokenizer.from_file(str(chosen.weights / "tokenizer.json"))
    model = Model.from_pretrained(chosen.weights, dtype=torch.float32)
    lines = measure_all(model, corpus, tokenizer, chosen.queries, chosen.seed)
    if chosen.json:
        print(json.dumps(lines))
        return 0
    print(f"{'split':9}{'task':8}{'lang':6}{'queries':>8}{'nDCG@10':>9}{'R@1':>7}")
    for line in lines:
        print(
            f"{line['split']:9}{line['task']:8}{line['language']:6}{line['queries']:>8}{line['ndcg10']:>9.3f}{line['r1']:>7.3f}"
        )
    print(f"{'random':31}{0.152:>9.3f}{1 / CANDIDATES:>7.3f}")
    return 0


_MEASURED = {
    "style": ("show", "tell", "alike", "words"),
    "concept": ("show", "tell"),
    "seen": ("show", "tell"),
    "photo": ("show", "tell", "alike"),
}


def _name(corpus: Corpus, image: int, language: str) -> list[str]:
    names: list[str] = getattr(corpus.concepts[corpus.concept_of[image]], language)[:1]
    return names


def _draw_distinct(corpus: Corpus, images: list[int], rng: random.Random) -> list[int]:
    chosen: dict[int, int] = {}
    for _ in range(2000):
        if len(chosen) == CANDIDATES - 1 or not images:
            break
        image = rng.choice(images)
        chosen.setdefault(int(corpus.concept_of[image]), image)
    return list(chosen.values())


if __name__ == "__main__":
    sys.exit(main())
