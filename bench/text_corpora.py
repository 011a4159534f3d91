"""The corpora that the text classifier is trained and measured on, read from a folder; none is part of this project.

Under the folder each has the name of its repository. What is trained on:

    hate-speech-and-offensive-language   github.com/t-davidson/…, MIT: 24,783 tweets with votes for hate, offence, neither
    edos                                 github.com/rewire-online/edos, CC0: 20,000 posts of Reddit and Gab, sexist or not
    COLDataset                           github.com/thu-coai/COLDataset, Apache-2.0: 37,480 Chinese comments, offensive or not
    SWSR                                 github.com/aggiejiang/SWSR, MIT: 8,969 Chinese comments, sexist or not
    MedQuAD                              github.com/abachaa/MedQuAD, CC BY 4.0: answers to medical questions
    PaddlePaddle-docs                    github.com/PaddlePaddle/docs, Apache-2.0: a developer's documentation, mostly Chinese
    wordnet                              text_text.jsonl.gz: WordNet's glosses and CLDR's names (WordNet licence, Unicode-3.0)

What only measures:

    hatecheck-data                       github.com/paul-rottger/hatecheck-data, CC BY 4.0: functional tests
    multilingual-hatecheck               github.com/rewire-online/…, CC BY 4.0: the same in Mandarin, and more languages
    moderation-api-release               github.com/openai/…, MIT: 1,680 texts labelled by kind of harm
    ToxiBenchCN                          github.com/thomasyyyoung/ToxiBenchCN, MIT; its sentences may come from a corpus with
                                         another licence, so nothing is learnt from it
    sharealike                           optional_sharealike_text.jsonl.gz: STS-B (captions, forums, news) and CMRC (Wikipedia)
"""

from __future__ import annotations

import csv
import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

from bench.neutral_sentences import hostile_sentences, neutral_sentences

OFFENSIVE_WEIGHT = 0.1
"""Of a tweet that is offensive and not hateful: much of it is dialect, and what EDOS calls sexist is among it."""
_NOT_SAID = re.compile(r"@\w+|\[USER\]|\[URL\]|https?://\S+|\bRT\b|<[^>]{1,20}>|&#?\w{1,8};")
_MARKUP = re.compile(r"^\s*(?:\.\.|:|-{3,}|={3,}|\|).*$", re.MULTILINE)
TRAIN, DEV, TEST = "train", "dev", "test"


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text with what people said of it."""

    corpus: str
    language: str
    text: str
    hateful: float
    """1 or 0; between them where people disagree."""
    split: str
    weight: float = 1.0
    kind: str = ""
    """The corpus's own class of it."""
    group: str = ""
    """Whom it is about, where the corpus says so."""


def labelled_corpora(folder: Path) -> Iterator[Labelled]:
    """What is trained on and has labels, with its own splits where it has them."""
    yield from _davidson(folder)
    for row in _rows(folder / "edos/data/edos_labelled_aggregated.csv"):
        if row["split"] in (TRAIN, DEV, TEST):
            yield Labelled("EDOS", "en", _said(row["text"]), row["label_sexist"] == "sexist", row["split"])
    for split in (TRAIN, DEV, TEST):
        for row in _rows(folder / f"COLDataset/COLDataset/{split}.csv"):
            text = _said(row["TEXT"])
            # Its `dev` holds near copies of its `train`: it would calibrate what was learnt by heart.
            part = TRAIN if split != TEST else (TEST, DEV)[_place(text) % 2]
            yield Labelled(
                "COLD", "zh", text, int(row["label"]), part, kind=row.get("fine-grained-label", "")
            )
    for row in _rows(folder / "SWSR/SWSR/SexComment.csv"):
        text = _said(row["comment_text"])
        yield Labelled("SWSR", "zh", text, int(row["label"]), _split(text))


def own_sentences() -> Iterator[Labelled]:
    """Sentences of this project's own that name groups of people; all are trained on."""
    for language, text in neutral_sentences():
        yield Labelled("own", language, text, 0, TRAIN, weight=2.0)
    for language, text in hostile_sentences():
        yield Labelled("own", language, text, 1, TRAIN)


def benign_corpora(folder: Path) -> Iterator[Labelled]:
    """Documents in which nobody is insulted."""
    for path in sorted((folder / "MedQuAD").glob("*/*.xml")):
        for answer in ElementTree.parse(path).iter("Answer"):
            if text := " ".join((answer.text or "").split()):
                yield Labelled("medical", "en", text, 0, _split(path.name))
    for path in sorted((folder / "PaddlePaddle-docs/docs").rglob("*.rst")):
        language = "zh" if path.stem.endswith("_cn") else "en"
        text = _MARKUP.sub("", path.read_text("utf-8", errors="replace"))
        yield Labelled("developer", language, text, 0, _split(path.name))
    for row in _json_lines(folder / "wordnet/text_text.jsonl.gz"):
        text = f"{row['a']}: {row['b']}. {row.get('example') or ''}"
        yield Labelled("glosses", "en" if row["lb"] == "en" else "zh", text, 0, _split(text))
    for row in islice(_json_lines(folder / "sharealike/optional_sharealike_text.jsonl.gz"), 0, None, 2):
        if row["source"].startswith("cmrc"):
            yield Labelled("encyclopedia", "zh", row["b"], 0, TEST)
        else:
            yield Labelled("captions, forums, news", row["la"], row["a"], 0, TEST)


def functional_tests(folder: Path) -> Iterator[Labelled]:
    """HateCheck: what a classifier of hate must tell apart, by functionality and by group. Never trained on."""
    mandarin = "multilingual-hatecheck/MHC Final Cases/hatecheck_cases_final_mandarin.csv"
    for language, path in (("en", "hatecheck-data/test_suite_cases.csv"), ("zh", mandarin)):
        for row in _rows(folder / path):
            hateful = row["label_gold"] == "hateful"
            yield Labelled(
                "HateCheck",
                language,
                row["test_case"],
                hateful,
                TEST,
                kind=row["functionality"],
                group=row["target_ident"],
            )


def other_tests(folder: Path) -> Iterator[Labelled]:
    """Texts of other origin than what is trained on, one set a language. Never trained on."""
    for row in _json_lines(folder / "moderation-api-release/data/samples-1680.jsonl.gz"):
        insults = bool(row.get("H") or row.get("H2"))
        if insults or row.get("H") is not None:  # most are labelled for other harms alone
            yield Labelled("moderation", "en", row["prompt"], insults, TEST)
    for name, hateful in (("toxic_base", True), ("non_toxic_base", False)):
        for row in json.loads((folder / f"ToxiBenchCN/CNTP_dataset/{name}.json").read_text("utf-8")):
            yield Labelled("ToxiBenchCN", "zh", _said(row.get("original_text") or row["text"]), hateful, TEST)


def _davidson(folder: Path) -> Iterator[Labelled]:
    for row in _rows(folder / "hate-speech-and-offensive-language/data/labeled_data.csv"):
        text = _said(row["tweet"])
        kind = ("hate", "offensive", "neither")[int(row["class"])]
        hateful = (
            int(row["hate_speech"]) / int(row["count"]) if kind == "offensive" else float(kind == "hate")
        )
        weight = OFFENSIVE_WEIGHT if kind == "offensive" else 1.0
        yield Labelled("Davidson", "en", text, hateful, _split(text), weight, kind)


def _said(text: str) -> str:
    """A post without names, links and marks of its platform."""
    return " ".join(_NOT_SAID.sub(" ", html.unescape(text)).split())


def _split(key: str) -> str:
    """A fixed tenth for calibration, a fifth to measure, the rest to train on."""
    place = _place(key) % 10
    return TEST if place < 2 else DEV if place == 2 else TRAIN


def _place(key: str) -> int:
    return zlib.crc32(key.encode("utf-8", "surrogatepass"))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _json_lines(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
