"""Rows of the validation split: 30 candidates, the first of which alone is right, by split, task and language.

show     a name, candidates are images          words    a name in one language, candidates in the other
tell     an image, candidates are names         gloss    a word, candidates are definitions
alike    an image, candidates are images        passage  a question, candidates are passages of three sentences
caption  a written description of a product, candidates are product shots
scene    a caption of two to four things, candidates are composed pictures
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from models.demo.data import Corpus, list_images, shorten_name
from models.demo.model import Entry, Row
from models.demo.passages import Fact, can_describe, compose_passage, define, describe
from models.demo.scenes import Scene, caption_scene, draw_family, fits, list_things

CANDIDATES = 30
MEASURED = (
    ("style", "show"), ("style", "tell"), ("style", "alike"), ("style", "words"),
    ("concept", "show"), ("concept", "tell"), ("concept", "words"),
    ("title", "show"), ("title", "tell"),
    ("photo", "show"), ("photo", "tell"), ("photo", "alike"),
    ("product", "show"), ("product", "caption"),
    ("scene", "scene"),
    ("text", "gloss"), ("text", "passage"),
    ("seen", "show"), ("seen photo", "show"),
)  # fmt: skip
PAIRINGS = {
    "show": "text-image", "caption": "text-image", "scene": "text-image", "tell": "image-text",
    "alike": "image-image", "words": "text-text", "gloss": "text-text", "passage": "text-text",
}  # fmt: skip


def draw_rows(corpus: Corpus, split: str, task: str, language: str, queries: int, seed: int) -> list[Row]:
    """Up to `queries` rows; none where the split has no such texts. Images and texts are those that were held out."""
    rng = random.Random(f"{split}/{task}/{language}/{seed}")
    if task == "scene":
        return _draw_scenes(corpus, language, queries, rng)
    if split == "text":
        return _draw_texts(corpus, task, language, queries, rng)
    images = [i for i in list_images(corpus, split) if list_names(corpus, i, language)]
    rng.shuffle(images)
    rows: list[Row] = []
    for image in images:
        if len(rows) == queries:
            break
        row = _draw_row(corpus, task, language, image, images, rng)
        if row:
            rows.append(row)
    return rows


def list_scenes(corpus: Corpus) -> list[Scene]:
    """The scenes of held-out things that `scene` rows number from `len(corpus.concept_of)` on."""
    rng = random.Random("scenes")
    things = list_things(corpus, list_images(corpus, "concept") + list_images(corpus, "style"))
    photos = list_images(corpus, "photo")
    return [scene for _ in range(60) for scene in draw_family(corpus, things, photos, rng)]


def list_names(corpus: Corpus, image: int, language: str) -> list[str]:
    """What an image is called in a language: nothing, or its concept's first name."""
    names: list[str] = getattr(corpus.concepts[corpus.concept_of[image]], language)
    return names[:1]


def _draw_row(
    corpus: Corpus, task: str, language: str, image: int, images: Sequence[int], rng: random.Random
) -> Row | None:
    concept = corpus.concepts[corpus.concept_of[image]]
    wrong = _draw_others(corpus, image, images, rng)
    if len(wrong) < CANDIDATES - 1:
        return None
    shown = [image, *wrong]
    pictures = tuple(Entry(image=i) for i in shown)
    texts = tuple(Entry(list_names(corpus, i, language)[0]) for i in shown)
    if task == "show":
        return Row(texts[0], pictures, (), task=task)
    if task == "tell":
        return Row(pictures[0], texts, (), task=task)
    if task == "caption":
        told = concept.descriptions if language == "en" else []
        return Row(Entry(told[0]), pictures, (), task=task) if told else None
    if task == "alike":  # another drawing, or another photo, of the same
        source = corpus.source_of[image]
        twins = [
            i
            for i in concept.images
            if i != image and (concept.kind == "photo" or corpus.source_of[i] != source)
        ]
        return (
            Row(Entry(image=rng.choice(twins)), pictures, (), task=task)
            if twins and language == "en"
            else None
        )
    other = list_names(corpus, image, "zh" if language == "en" else "en")
    return Row(Entry(other[0]), texts, (), task=task) if other else None


def _draw_others(corpus: Corpus, image: int, images: Sequence[int], rng: random.Random) -> list[int]:
    """Images of 29 other concepts, none of which has a name in common with `image`'s."""
    own = corpus.concepts[corpus.concept_of[image]]
    names = {shorten_name(name) for name in own.en + own.zh}
    chosen: dict[int, int] = {}
    for _ in range(600):
        other = rng.choice(images)
        concept = corpus.concepts[corpus.concept_of[other]]
        if not names & {shorten_name(name) for name in concept.en + concept.zh}:
            chosen.setdefault(int(corpus.concept_of[other]), other)
        if len(chosen) == CANDIDATES - 1:
            break
    return list(chosen.values())


def _draw_texts(corpus: Corpus, task: str, language: str, queries: int, rng: random.Random) -> list[Row]:
    if task == "gloss" and language == "zh":
        return []
    facts = [define(one) for one in corpus.held_glosses]
    if language == "zh":
        facts = [describe(concept) for concept in corpus.concepts if concept.held and can_describe(concept)]
    rows = []
    for number in range(queries):
        first = facts[number % len(facts)]
        others = [
            fact for fact in rng.sample(facts, CANDIDATES + 5) if not set(fact.names) & set(first.names)
        ]
        chosen = [first, *others[: CANDIDATES - 1]]
        if task == "gloss":
            rows.append(
                Row(Entry(first.names[0]), tuple(Entry(fact.said[0]) for fact in chosen), (), task=task)
            )
        else:
            entries = tuple(Entry(_write(fact, facts, rng)) for fact in chosen)
            rows.append(Row(Entry(first.ask(rng)), entries, (), task=task))
    return rows


def _write(fact: Fact, facts: Sequence[Fact], rng: random.Random) -> str:
    return compose_passage(fact, rng.sample(list(facts), 2), rng)


def _draw_scenes(corpus: Corpus, language: str, queries: int, rng: random.Random) -> list[Row]:
    scenes = list_scenes(corpus)
    rows = []
    for first in rng.sample(range(len(scenes)), min(queries, len(scenes))):
        caption = caption_scene(corpus, scenes[first], rng, chinese=language == "zh")
        others = rng.sample([i for i in range(len(scenes)) if i != first], 2 * CANDIDATES)
        siblings = [i for i in range(first - first % 4, first - first % 4 + 4) if i != first]
        wrong = [i for i in dict.fromkeys(siblings + others) if not fits(caption, scenes[first], scenes[i])]
        shown = [first, *wrong[: CANDIDATES - 1]]
        entries = tuple(Entry(image=len(corpus.concept_of) + i) for i in shown)
        rows.append(Row(Entry(caption.text), entries, (), task="scene"))
    return rows
