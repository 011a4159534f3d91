"""Measure the demo model on what was held out of its training: `python -m models.demo.evaluate`.

Prints nDCG@10 and R@1 by split, task, pairing and language, beside BM25 where both sides are text and, with
`--against`, another version's weights on the same rows. Every row has 30 candidates of which one is right, so a random
order has an nDCG@10 of 0.15 and an R@1 of 0.03. `--pictures` draws ten rankings and the reliability of the scores.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from models.demo import bm25, calibration, pictures, questions
from models.demo.data import Corpus, load_corpus
from models.demo.model import UNIT, Model, Packer, Row, autocast, encode_images, read_states
from models.demo.questions import CANDIDATES, MEASURED, PAIRINGS, draw_rows
from models.demo.scenes import paint_scene
from models.demo.views import resize_images

HERE = Path(__file__).parent
RANDOM = (sum(1 / math.log2(1 + rank) for rank in range(1, 11)) / CANDIDATES, 1 / CANDIDATES)
PACKED = 10  # candidates of a pack
WATCHED = (
    ("concept", "show", "en", 32), ("concept", "show", "zh", 24), ("concept", "tell", "en", 24), ("photo", "show", "en", 24),
    ("photo", "alike", "en", 12), ("title", "show", "en", 24), ("text", "passage", "en", 12), ("text", "passage", "zh", 12),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """What was measured of one split, task and language. `bm25` and `before` are nDCG@10 where there is one."""

    split: str
    task: str
    pairing: str
    language: str
    queries: int
    ndcg10: float
    r1: float
    bm25: float | None = None
    before: float | None = None


def measure_rank(margins: Sequence[float]) -> tuple[float, float]:
    """nDCG@10 and R@1 where the first candidate alone is right; ties count against it."""
    rank = sum(margin >= margins[0] for margin in margins[1:]) + 1
    return (1 / math.log2(1 + rank) if rank <= 10 else 0.0), float(rank == 1)


def average(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean nDCG@10 and R@1 of rows."""
    gains, firsts = zip(*(measure_rank(one) for one in scores), strict=True)
    return round(float(np.mean(gains)), 3), round(float(np.mean(firsts)), 3)


def score_all(
    model: Model,
    corpus: Corpus,
    packer: Packer,
    rows: Sequence[Row],
    side: int = 112,
    known: dict[int, torch.Tensor] | None = None,
) -> list[list[float]]:
    """Margins of each row's candidates, in order, with images of `side` x `side` pixels. `known` keeps visual tokens for
    the next call with the same model and side."""
    answer = find_answer(model, packer)
    return [(states @ answer).tolist() for states in collect_states(model, corpus, packer, rows, side, known)]


def find_answer(model: Model, packer: Packer) -> torch.Tensor:
    """What a final state is multiplied by for z_yes - z_no, [hidden]."""
    table: torch.Tensor = model.model.language_model.embed_tokens.weight.detach()
    return table[packer.answers[0]] - table[packer.answers[1]]


@torch.no_grad()
def collect_states(
    model: Model,
    corpus: Corpus,
    packer: Packer,
    rows: Sequence[Row],
    side: int = 112,
    known: dict[int, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The final states of each row's candidates, [candidates, hidden]. Ten candidates are packed at a time: a score
    does not depend on its neighbours, and a short row attends faster."""
    known = {} if known is None else known
    encode_entries(model, corpus, rows, side, known)
    found = []
    for row in rows:
        parts = []
        for start in range(0, len(row.candidates), PACKED):
            part = replace(row, candidates=row.candidates[start : start + PACKED])
            packed = packer.pack([part], lambda _: (side // UNIT, side // UNIT)).to(model.device)
            seen = [known[i] for i in packed.images]
            visual = torch.cat(seen) if seen else torch.zeros(0, device=model.device)
            with autocast(model.device.type):
                parts.append(read_states(model, packed, visual)[0].float())
        found.append(torch.cat(parts))
    return found


@torch.no_grad()
def encode_entries(
    model: Model, corpus: Corpus, rows: Sequence[Row], side: int, known: dict[int, torch.Tensor]
) -> None:
    """Add to `known` the visual tokens of every image that rows name: one of the corpus, or a scene behind them."""
    named = {e.image for row in rows for e in (row.query, *row.candidates) if e.image is not None}
    images = sorted(named - set(known))
    own = len(corpus.concept_of)
    scenes = questions.list_scenes(corpus) if images and images[-1] >= own else []
    for start in range(0, len(images), 128):
        part = images[start : start + 128]
        parts = [
            resize_images(
                (corpus.pixels[i] if i < own else paint_scene(corpus, scenes[i - own]))[None], side, side
            )
            for i in part
        ]
        known.update(zip(part, encode_images(model, torch.cat(parts).to(model.device)), strict=True))


def score_briefly(model: Model, corpus: Corpus, packer: Packer) -> dict[str, float]:
    """nDCG@10 of the few tasks that a training run watches; the held-out vendor is not among them."""
    result = {}
    for split, task, language, queries in WATCHED:
        rows = draw_rows(corpus, split, task, language, queries, 3)
        result[f"{split}_{task}_{language}"] = average(score_all(model, corpus, packer, rows))[0]
    return result


def measure_all(
    model: Model, corpus: Corpus, packer: Packer, queries: int, seed: int, before: Model | None = None
) -> list[Line]:
    """One line per split, task and language."""
    lines = []
    seen: dict[int, torch.Tensor] = {}
    seen_before: dict[int, torch.Tensor] = {}
    for split, task in MEASURED:
        for language in ("en", "zh"):
            rows = draw_rows(corpus, split, task, language, queries, seed)
            if not rows:
                continue
            ndcg, first = average(score_all(model, corpus, packer, rows, known=seen))
            texts = [
                bm25.score_texts(row.query.text, [e.text for e in row.candidates])
                for row in rows
                if PAIRINGS[task] == "text-text"
            ]
            told = average(texts)[0] if texts else None
            compared = (
                average(score_all(before, corpus, packer, rows, known=seen_before))[0] if before else None
            )
            lines.append(Line(split, task, PAIRINGS[task], language, len(rows), ndcg, first, told, compared))
            print(f"measured {split}, {task}, {language}", file=sys.stderr, flush=True)
    return lines


def print_table(lines: Sequence[Line]) -> None:
    """Lines as the table of the model card."""
    print("| split | task | pairing | language | queries | nDCG@10 | R@1 | BM25 | before |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for line in lines:
        values = [line.ndcg10, line.r1, line.bm25, line.before]
        told = ["" if value is None else f"{value:.2f}" for value in values]
        cells = [line.split, line.task, line.pairing, line.language.upper(), str(line.queries), *told]
        print(f"| {' | '.join(cells)} |")
    print(f"| random order | | | | | {RANDOM[0]:.2f} | {RANDOM[1]:.2f} | | |")


def load_weights(folder: Path, device: str = "cpu") -> Model:
    """A checkpoint's model, in fp32."""
    model: Model = Model.from_pretrained(folder, dtype=torch.float32)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.demo.evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--data", type=Path, default=HERE.parents[1].parent / "shared/data/train",
                        help="folder of image_text.jsonl.gz and the zips (default: ../shared/data/train)")  # fmt: skip
    parser.add_argument("--weights", type=Path, default=HERE / "weights", help="a checkpoint directory")
    parser.add_argument("--against", type=Path, help="another version's directory, measured on the same rows")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo"), help="decoded images are kept here")
    parser.add_argument("--queries", type=int, default=60, help="queries of each line at most (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="draws queries and candidates (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--pictures", type=Path, help="write rankings.png and reliability.png to this folder and stop"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    corpus = load_corpus(chosen.data, chosen.cache)
    packer = Packer(Tokenizer.from_file(str(chosen.weights / "tokenizer.json")))
    model = load_weights(chosen.weights, chosen.device)
    rows = calibration.draw_checked(corpus, chosen.seed)
    reliability = calibration.measure(score_all(model, corpus, packer, rows))
    if chosen.pictures:
        pictures.draw_rankings(corpus, lambda asked: score_all(model, corpus, packer, asked), chosen.pictures)
        pictures.draw_reliability(reliability, chosen.pictures)
        return 0
    before = load_weights(chosen.against, chosen.device) if chosen.against else None
    lines = measure_all(model, corpus, packer, chosen.queries, chosen.seed, before)
    if chosen.json:
        print(json.dumps({"lines": [asdict(line) for line in lines], "reliability": asdict(reliability)}))
        return 0
    print_table(lines)
    print(f"\nexpected calibration error over {len(rows)} lists: {reliability.error:.3f} of all candidates, "
          f"{reliability.first_error:.3f} of the first of each")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
