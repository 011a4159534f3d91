"""The classifier of texts: trains it, calibrates it, and measures what it adds to the lists. Needs the corpora.

`bench/text_corpora.py` says which, from where, and under which licence. With --train the weights are written and what is
to be pinned is printed: their digest (`DIGEST` in service/screening/text/classifier.py) and the table of raw scores
(`classifier` in service/screening/calibration.json). Without it the classifier that is pinned is measured, on texts that
were in no training:

    posts       by corpus: AUC of the raw score; of the judged one recall, precision and F1 at each threshold
    functions   HateCheck by functionality: the share that reaches each threshold, by the lists and with the classifier
    identities  HateCheck's neutral and positive sentences about a group, by group
    benign      the share of harmless documents that reaches each threshold
    disguises   of posts found in plain writing, the share that is found in each disguise
    padding     of posts found alone, the share that is found within 10,000 harmless characters

    python bench/text_classifier.py --corpora FOLDER [--train] [--save]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.disguises import DISGUISES  # noqa: E402
from bench.report import git_commit  # noqa: E402
from bench.text_corpora import (  # noqa: E402
    DEV,
    TEST,
    TRAIN,
    Labelled,
    benign_corpora,
    functional_tests,
    labelled_corpora,
    other_tests,
    own_sentences,
)
from service.screening.calibration import load_calibration  # noqa: E402
from service.screening.judge import measure  # noqa: E402
from service.screening.signals import Findings  # noqa: E402
from service.screening.text import Reader  # noqa: E402
from service.screening.text.classifier import DETECTOR, DIGEST, WEIGHTS, Classifier  # noqa: E402
from service.screening.text.views import view  # noqa: E402
from tenants.risk import Category  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "text_classifier.json"
THRESHOLDS = (0.3, 0.6, 0.8)
HATEFUL_SHARE = 0.05
"""Of what is calibrated on; half of the others are posts, half documents. In corpora made to hold insults it is more."""
CALIBRATED = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
HIGHEST = 0.75
"""However sure: one classifier alone is a doubt, and `judge` asks for a second witness from 0.8 on."""
PADDED_CHARACTERS = 10_000
AT_ONCE = 128

Floats = npt.NDArray[np.float64]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path, required=True, help="the folder that holds the corpora")
    parser.add_argument(
        "--train", action="store_true", help="write new weights instead of measuring those there are"
    )
    parser.add_argument(
        "--save", action="store_true", help="keep the figures in bench/results/text_classifier.json"
    )
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(options.corpora), indent=1))
        return 0
    report = {
        "name": "text_classifier",
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "digest": DIGEST,
        "figures": figures(options.corpora),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if options.save:
        RESULTS.write_text(text + "\n", "utf-8")
    return 0


def train(corpora: Path) -> dict[str, Any]:
    """Fit, write the file, calibrate. What is to be pinned."""
    from bench.text_training import train as fit

    labelled = list(labelled_corpora(corpora))
    benign = list(benign_corpora(corpora))
    classifier = fit(
        [*(each for each in labelled if each.split == TRAIN), *own_sentences()],
        [each for each in benign if each.split == TRAIN],
    )
    posts, documents = ([each for each in group if each.split == DEV] for group in (labelled, benign))
    classifier = fit_lines(classifier, posts, documents)
    content = save({"weights": classifier.weights, "lines": classifier.lines})
    WEIGHTS.write_bytes(content)
    return {"digest": hashlib.sha256(content).hexdigest(), "points": calibrate(classifier, posts, documents)}


def fit_lines(classifier: Classifier, posts: Sequence[Labelled], documents: Sequence[Labelled]) -> Classifier:
    """The classifier with a slope and an offset of its own for texts without and with hanzi (Platt's scaling)."""
    lines = classifier.lines.copy()
    for hanzi, language in enumerate(("en", "zh")):
        of_posts, of_documents = (
            [each for each in group if each.language == language] for group in (posts, documents)
        )
        logits = logits_of(scores(classifier, [*of_posts, *of_documents]))
        hateful, weight = weigh(of_posts, of_documents)
        slope, offset = 1.0, 0.0
        for _ in range(50):  # Newton's method; two unknowns
            expected = 1 / (1 + np.exp(-(slope * logits + offset)))
            curve = weight * expected * (1 - expected)
            error = weight * (expected - hateful)
            second = np.array([[curve @ logits**2, curve @ logits], [curve @ logits, curve.sum()]])
            step = np.linalg.solve(second, [error @ logits, error.sum()])
            slope, offset = slope - step[0], offset - step[1]
        lines[hanzi] = slope * lines[hanzi, 0], slope * lines[hanzi, 1] + offset
    return Classifier(classifier.weights, lines)


def weigh(posts: Sequence[Labelled], documents: Sequence[Labelled]) -> tuple[Floats, Floats]:
    """Of posts, then documents: whether each is hateful, and its weight, so that `HATEFUL_SHARE` of the weight is."""
    hateful = np.array([each.hateful > 0.5 for each in (*posts, *documents)])
    weight = np.array([each.weight for each in (*posts, *documents)])
    of_posts = np.arange(len(weight)) < len(posts)
    for part, share in (
        (hateful, HATEFUL_SHARE),
        (of_posts & ~hateful, (1 - HATEFUL_SHARE) / 2),
        (~of_posts, (1 - HATEFUL_SHARE) / 2),
    ):
        weight[part] *= share / weight[part].sum()
    return hateful.astype(float), weight


def calibrate(
    classifier: Classifier, posts: Sequence[Labelled], documents: Sequence[Labelled]
) -> list[tuple[float, float]]:
    """(raw, calibrated) by isotonic regression over both languages, read off at `CALIBRATED`."""
    raw = scores(classifier, [*posts, *documents])
    hateful, weight = weigh(posts, documents)
    order = np.argsort(raw, kind="stable")
    fitted = isotonic(hateful[order], weight[order])
    points = [(0.0, 0.0)]
    for level in CALIBRATED:
        place = int(np.searchsorted(fitted, level))
        if place < len(order) and (least := round(float(raw[order[place]]), 4)) > points[-1][0]:
            points.append((least, level))
    return [*points, (1.0, HIGHEST)]


def logits_of(raw: Floats) -> Floats:
    cut = np.clip(raw, 1e-12, 1 - 1e-12)
    return np.log(cut / (1 - cut))


def isotonic(values: Floats, weights: Floats) -> Floats:
    """The rising sequence nearest to `values` by weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, mass, count = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            before, before_mass, before_count = blocks.pop()
            mean = (before * before_mass + mean * mass) / (before_mass + mass)
            mass, count = mass + before_mass, count + before_count
        blocks.append((mean, mass, count))
    return np.concatenate([np.full(count, mean) for mean, _, count in blocks])


def figures(corpora: Path) -> list[dict[str, Any]]:
    """All that the module's docstring lists."""
    read = Reading()
    posts = [each for each in (*labelled_corpora(corpora), *other_tests(corpora)) if each.split == TEST]
    checks = list(functional_tests(corpora))
    benign = [each for each in benign_corpora(corpora) if each.split == TEST]
    plain = [each for each in posts if each.kind != "offensive"]
    found: list[dict[str, Any]] = []
    for name, group in by(plain, lambda each: f"{each.corpus}, {each.language}"):
        found.append({"what": "posts", "set": name, **read.posts(group)})
    offensive = [each for each in posts if each.kind == "offensive"]
    found.append(
        {"what": "posts", "set": "Davidson, en, offensive and not hateful", **read.shares(offensive)}
    )
    for name, group in by(checks, lambda each: f"{each.language}, {each.kind}"):
        found.append({"what": "functions", "set": name, **read.shares(group)})
    neutral = [each for each in checks if each.kind in ("ident_neutral_nh", "ident_pos_nh")]
    for name, group in by(neutral, lambda each: f"{each.language}, {each.group}"):
        found.append({"what": "identities", "set": name, **read.shares(group)})
    for name, group in by(benign, lambda each: f"{each.corpus}, {each.language}"):
        found.append({"what": "benign", "set": name, **read.shares(group)})
    found += read.disguises([each for each in plain if each.language == "en" and each.hateful == 1])
    found += read.padding(plain, benign)
    return found


class Reading:
    """Reads texts as the service does, with the classifier and without it, and judges hate."""

    def __init__(self) -> None:
        self._reader = Reader()
        self._classifier = Classifier.read()
        self._tables = load_calibration()

    def hate(self, texts: Sequence[str]) -> tuple[Floats, Floats]:
        """[texts] the judged score of hate by the lists alone, and with the classifier."""
        both = [
            self._judged(each)
            for start in range(0, len(texts), AT_ONCE)
            for each in self._reader.read(texts[start : start + AT_ONCE])
        ]
        return np.array([lists for lists, _ in both]), np.array([everything for _, everything in both])

    def _judged(self, findings: Findings) -> tuple[float, float]:
        lists = Findings(tuple(signal for signal in findings.signals if signal.detector != DETECTOR))
        return tuple(  # type: ignore[return-value]
            max(
                (risk.score for risk in measure(each, self._tables) if risk.category is Category.HATE),
                default=0.0,
            )
            for each in (lists, findings)
        )

    def shares(self, group: Sequence[Labelled]) -> dict[str, Any]:
        lists, everything = self.hate([each.text for each in group])
        return {"texts": len(group), "lists": _shares(lists), "with_classifier": _shares(everything)}

    def posts(self, group: Sequence[Labelled]) -> dict[str, Any]:
        hateful = np.array([each.hateful > 0.5 for each in group])
        lists, everything = self.hate([each.text for each in group])
        return {
            "texts": len(group),
            "hateful": int(hateful.sum()),
            "auc": round(auc(hateful, scores(self._classifier, group)), 3),
            "lists": _quality(hateful, lists),
            "with_classifier": _quality(hateful, everything),
        }

    def disguises(self, hateful: Sequence[Labelled]) -> list[dict[str, Any]]:
        """Of posts that reach 0.3 in plain writing: how many still do when every word is disguised."""
        texts = [each.text for each in hateful]
        plain = self.hate(texts)
        chosen = [text for text, score in zip(texts, plain[1], strict=True) if score >= THRESHOLDS[0]]
        table = []
        for name, disguise in DISGUISES.items():
            lists, everything = self.hate(
                [" ".join(map(disguise, text.lower().split(" "))) for text in chosen]
            )
            table.append(
                {
                    "what": "disguises",
                    "set": name,
                    "texts": len(chosen),
                    "lists": _shares(lists),
                    "with_classifier": _shares(everything),
                }
            )
        return table

    def padding(self, posts: Sequence[Labelled], benign: Sequence[Labelled]) -> list[dict[str, Any]]:
        """Of posts that reach 0.3 by themselves: how many do at a random place within harmless text of their language."""
        rng = random.Random(3)
        table = []
        for language, group in by([each for each in posts if each.hateful == 1], lambda each: each.language):
            around = " ".join(each.text for each in benign if each.language == language)
            texts = [each.text for each in group]
            chosen = [
                text for text, score in zip(texts, self.hate(texts)[1], strict=True) if score >= THRESHOLDS[0]
            ][:200]
            padded = []
            for text in chosen:
                start = rng.randrange(len(around) - PADDED_CHARACTERS)
                place = start + rng.randrange(PADDED_CHARACTERS)
                padded.append(f"{around[start:place]} {text} {around[place : start + PADDED_CHARACTERS]}")
            table.append(
                {
                    "what": "padding",
                    "set": language,
                    "texts": len(chosen),
                    "with_classifier": _shares(self.hate(padded)[1]),
                }
            )
        return table


def scores(classifier: Classifier, texts: Sequence[Labelled]) -> Floats:
    """[texts] the raw score of each."""
    return np.array(
        [
            score
            for start in range(0, len(texts), AT_ONCE)
            for score in classifier.score([view(each.text) for each in texts[start : start + AT_ONCE]])
        ]
    )


def auc(hateful: npt.NDArray[np.bool_], raw: Floats) -> float:
    """How often a hateful text scores above one that is not, ties counting half."""
    _, place, count = np.unique(raw, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    positive = int(hateful.sum())
    return float((rank[hateful].sum() - positive * (positive + 1) / 2) / (positive * (len(raw) - positive)))


def by(texts: Iterable[Labelled], name: Callable[[Labelled], str]) -> list[tuple[str, list[Labelled]]]:
    """The texts in groups, by name."""
    groups: dict[str, list[Labelled]] = defaultdict(list)
    for each in texts:
        groups[name(each)].append(each)
    return sorted(groups.items())


def _shares(judged: Floats) -> dict[str, float]:
    return {
        str(least): round(float((judged >= least).mean()), 4) if len(judged) else 0.0 for least in THRESHOLDS
    }


def _quality(hateful: npt.NDArray[np.bool_], judged: Floats) -> dict[str, dict[str, float]]:
    table = {}
    for least in THRESHOLDS:
        told = judged >= least
        right = int((told & hateful).sum())
        recall, precision = right / hateful.sum(), right / max(1, told.sum())
        f1 = 2 * right / (told.sum() + hateful.sum())
        alarms = float((told & ~hateful).sum() / (~hateful).sum())
        table[str(least)] = {
            "recall": round(float(recall), 3),
            "precision": round(float(precision), 3),
            "f1": round(float(f1), 3),
            "false_alarms": round(alarms, 4),
        }
    return table


if __name__ == "__main__":
    raise SystemExit(main())
