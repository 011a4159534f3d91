"""Listwise rows: a query, candidates, and which of them are right. Everything here is drawn at random from a corpus.

same     the right text is the query's own text            words    another name, keywords, the other language
gloss    a word and its gloss, either way; some wrong      show     a text, candidates are images
         glosses only mention the word                     tell     an image, candidates are texts
alike    an image, candidates are images                   mixed    a text, candidates are texts, images or both
keyword  one keyword, several candidates may be right      both     an image with text, candidates of any kind
passage  a question, candidates are passages (passages.py) scene    a caption and composed pictures, or the other
                                                                    way round (scenes.py)
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from models.demo.data import Concept, Corpus, pick_caption, vary_case
from models.demo.model import INSTRUCTION, Entry, Row
from models.demo.passages import can_describe, compose_passage, define, describe, list_content_words
from models.demo.scenes import Scene, caption_scene, fits

INSTRUCTIONS = (
    "Given a web search query, retrieve relevant candidates that answer the query",
    "Given a search query, retrieve relevant candidates that answer the query.",
    "Find the image that matches the description",
    "Find the text that describes the image",
    "Retrieve the document that means the same as the query",
    "Find products that match the query",
    "根据查询检索相关的内容",
    "找到与描述相符的图片",
)


class Tasks:
    """Draws rows from `images` (which concepts and styles may appear), from the corpus' texts, and from families of
    scenes, whose pictures are numbered from `len(corpus.concept_of)` on."""

    def __init__(
        self,
        corpus: Corpus,
        images: list[int],
        families: Sequence[Sequence[Scene]] = (),
        *,
        varied: bool = True,
    ) -> None:
        self._corpus, self._varied, self._families = corpus, varied, families
        self._by_concept: dict[int, list[int]] = defaultdict(list)
        self._by_source: dict[str, list[int]] = defaultdict(list)
        self._by_group: dict[str, list[int]] = defaultdict(list)
        self._by_kind: dict[str, list[int]] = defaultdict(list)
        for image in images:
            concept = int(corpus.concept_of[image])
            if not self._by_concept[concept]:
                self._by_group[corpus.concepts[concept].group].append(concept)
                self._by_kind[corpus.concepts[concept].kind].append(concept)
            self._by_concept[concept].append(image)
            self._by_source[corpus.source_of[image]].append(image)
        self._glosses: dict[str, list[int]] = defaultdict(list)
        for index, (_, _, group) in enumerate(corpus.glosses):
            self._glosses[group].append(index)
        self._mentions: dict[str, list[int]] = defaultdict(list)
        for index, (_, gloss, _) in enumerate(corpus.glosses):
            for word in sorted(list_content_words(gloss)):
                self._mentions[word].append(index)
        self._told_in_chinese = [c for c in self._by_concept if can_describe(corpus.concepts[c])]
        self._concepts_with: dict[str, list[int]] = defaultdict(list)
        self._keywords_of = {
            concept: self._list_keywords(corpus.concepts[concept]) for concept in self._by_concept
        }
        for concept, words in self._keywords_of.items():
            for word in sorted(words):
                self._concepts_with[word].append(concept)
        self._keywords = sorted(w for w, c in self._concepts_with.items() if 2 <= len(c) <= 150)
        self._makers: Mapping[str, Callable[[random.Random, int, float], Row]] = {
            "same": self._make_same, "words": self._make_words, "gloss": self._make_gloss, "show": self._make_show,
            "tell": self._make_tell, "alike": self._make_alike, "mixed": self._make_mixed,
            "keyword": self._make_keyword, "both": self._make_both, "passage": self._make_passage,
            "scene": self._make_scene,
        }  # fmt: skip

    def make(self, task: str, rng: random.Random, count: int, hard: float) -> Row:
        """A row of `task` with `count` candidates; `hard` is the share of negatives close to the right answer."""
        row = self._makers[task](rng, count, hard)
        order = list(range(len(row.candidates)))
        rng.shuffle(order)
        return Row(
            row.query,
            tuple(row.candidates[i] for i in order),
            tuple(row.labels[i] for i in order),
            rng.choice(INSTRUCTIONS) if self._varied and rng.random() < 0.25 else INSTRUCTION,
            task,
        )

    def _make_same(self, rng: random.Random, count: int, hard: float) -> Row:
        if rng.random() < 0.3:
            picked = rng.sample(self._corpus.glosses, count)
            texts = [rng.choice(one[:2]) for one in picked]
        else:
            concepts = self._draw_concepts(rng, count, hard)
            texts = [self._caption(concept, rng) for concept in concepts]
        return _settle(Entry(texts[0]), [Entry(text) for text in texts])

    def _make_words(self, rng: random.Random, count: int, hard: float) -> Row:
        concepts = self._draw_concepts(rng, count, hard)
        query = self._caption(concepts[0], rng)
        return _settle(Entry(query), [Entry(self._caption(concept, rng)) for concept in concepts])

    def _make_gloss(self, rng: random.Random, count: int, hard: float) -> Row:
        glosses = self._corpus.glosses
        first = rng.randrange(len(glosses))
        alike = glosses[first][0].split(", ")
        chosen = self._draw_glosses(first, rng, count, hard)
        words = rng.sample(alike, len(alike))
        word = words[0]
        if len(words) > 1 and rng.random() < 0.3:  # words of one meaning
            others = [Entry(rng.choice(glosses[i][0].split(", "))) for i in chosen[1:]]
            return _settle(Entry(word), [Entry(words[1]), *others])
        if rng.random() < 0.4:
            return _settle(Entry(glosses[first][1]), [Entry(glosses[i][0]) for i in chosen])
        said = [define(glosses[i]).say(rng) if rng.random() < 0.3 else glosses[i][1] for i in chosen]
        return _settle(Entry(vary_case(word, rng)), [Entry(text) for text in said])

    def _draw_glosses(self, first: int, rng: random.Random, count: int, hard: float) -> list[int]:
        """`first` and other glosses; some of its own group, up to three that only mention one of its words."""
        glosses = self._corpus.glosses
        near, own = self._glosses[glosses[first][2]], set(glosses[first][0].split(", "))
        chosen = [first]
        mentions = [
            i
            for word in sorted(own)
            for i in self._mentions[word]
            if not own & set(glosses[i][0].split(", "))
        ]
        chosen += rng.sample(mentions, min(len(mentions), rng.randint(0, 3), count - 1))
        while len(chosen) < count:
            other = rng.choice(near) if rng.random() < hard else rng.randrange(len(glosses))
            if not own & set(glosses[other][0].split(", ")):
                chosen.append(other)
        return chosen

    def _make_passage(self, rng: random.Random, count: int, hard: float) -> Row:
        count = min(count, 8)  # they are long
        if rng.random() < 0.45:
            concepts = rng.sample(self._told_in_chinese, 4 * count)
            facts = [describe(self._corpus.concepts[concept]) for concept in concepts]
        else:
            glosses = self._corpus.glosses
            chosen = self._draw_glosses(rng.randrange(len(glosses)), rng, count, hard)
            facts = [define(glosses[i]) for i in (*chosen, *rng.sample(range(len(glosses)), 3 * count))]
        length = rng.randint(1, 4)
        passages = [
            compose_passage(facts[i], facts[count + 3 * i : count + 3 * i + length - 1], rng)
            for i in range(count)
        ]
        return _settle(Entry(facts[0].ask(rng)), [Entry(passage) for passage in passages])

    def _make_scene(self, rng: random.Random, count: int, hard: float) -> Row:
        """The wrong ones are scenes of other families and those siblings of which the caption is not true."""
        home = rng.randrange(len(self._families))
        places = [(home, one) for one in range(len(self._families[home]))]
        rng.shuffle(places)
        others = rng.sample([i for i in range(len(self._families)) if i != home], count)
        places += [(family, rng.randrange(len(self._families[family]))) for family in others]
        chinese = rng.random() < 0.45
        scenes = [self._families[family][one] for family, one in places]
        captions = [caption_scene(self._corpus, scene, rng, chinese=chinese) for scene in scenes]
        if rng.random() < 0.7:
            wrong = [i for i in range(1, len(places)) if not fits(captions[0], scenes[0], scenes[i])]
            pictures = [self._number(*places[i]) for i in (0, *wrong[: count - 1])]
            return _settle(Entry(captions[0].text), [Entry(image=image) for image in pictures])
        wrong = [i for i in range(1, len(places)) if not fits(captions[i], scenes[i], scenes[0])]
        texts = [Entry(captions[i].text) for i in (0, *wrong[: count - 1])]
        return _settle(Entry(image=self._number(*places[0])), texts)

    def _number(self, family: int, one: int) -> int:
        """The number of a scene's picture: families of equal size, behind the corpus' own images."""
        return len(self._corpus.concept_of) + family * len(self._families[0]) + one

    def _make_show(self, rng: random.Random, count: int, hard: float) -> Row:
        concepts, images = self._draw_images(rng, count, hard)
        return _settle(Entry(self._caption(concepts[0], rng)), [Entry(image=image) for image in images])

    def _make_tell(self, rng: random.Random, count: int, hard: float) -> Row:
        concepts, images = self._draw_images(rng, count, hard)
        return _settle(Entry(image=images[0]), [Entry(self._caption(concept, rng)) for concept in concepts])

    def _make_alike(self, rng: random.Random, count: int, hard: float) -> Row:
        concepts, images = self._draw_images(rng, count, hard)
        others = [image for image in self._by_concept[concepts[0]] if image != images[0]]
        query = rng.choice(others or [images[0]])
        return _settle(Entry(image=query), [Entry(image=image) for image in images])

    def _make_mixed(self, rng: random.Random, count: int, hard: float) -> Row:
        concepts, images = self._draw_images(rng, count, hard)
        entries = [self._dress(concept, image, rng) for concept, image in zip(concepts, images, strict=True)]
        return _settle(Entry(self._caption(concepts[0], rng)), entries)

    def _make_both(self, rng: random.Random, count: int, hard: float) -> Row:
        concepts, images = self._draw_images(rng, count, hard)
        others = [image for image in self._by_concept[concepts[0]] if image != images[0]]
        query = Entry(self._caption(concepts[0], rng), rng.choice(others or [images[0]]))
        return _settle(query, [self._dress(c, i, rng) for c, i in zip(concepts, images, strict=True)])

    def _make_keyword(self, rng: random.Random, count: int, hard: float) -> Row:
        word = rng.choice(self._keywords)
        words = {word}
        right = self._concepts_with[word]
        if rng.random() < 0.4:  # two keywords of one concept, as in "red fruit"; one of them alone is wrong
            words |= {rng.choice(sorted(self._keywords_of[rng.choice(right)]))}
            right = [concept for concept in right if words <= self._keywords_of[concept]]
        chosen = rng.sample(right, min(len(right), rng.randint(1, 3)))
        kind = self._corpus.concepts[chosen[0]].kind
        near = [c for one in sorted(words) for c in self._concepts_with[one]]
        labels = [1.0] * len(chosen)
        while len(chosen) < count:
            concept = (
                rng.choice(near) if len(words) > 1 and rng.random() < 0.3 else rng.choice(self._by_kind[kind])
            )
            if not words <= self._keywords_of[concept] and concept not in chosen:
                chosen.append(concept)
                labels.append(0.0)
        asked = (" " if not any(map(_is_chinese, words)) else "").join(
            sorted(words, key=lambda _: rng.random())
        )
        pictures = rng.random() < 0.6
        entries = [
            Entry(image=rng.choice(self._by_concept[concept])) if pictures
            else Entry(rng.choice(self._corpus.concepts[concept].zh if _is_chinese(word) and self._corpus.concepts[concept].zh
                                  else self._corpus.concepts[concept].en))
            for concept in chosen
        ]  # fmt: skip
        return Row(Entry(vary_case(asked, rng)), tuple(entries), tuple(labels))

    def _draw_concepts(self, rng: random.Random, count: int, hard: float) -> list[int]:
        roll = rng.random()
        kind = "emoji" if roll < 0.65 else "clipart" if roll < 0.8 else "photo"
        first = rng.choice(self._by_kind[kind] or self._by_kind["emoji"])
        return self._add_negatives(first, rng, count, hard)

    def _add_negatives(self, first: int, rng: random.Random, count: int, hard: float) -> list[int]:
        """`first` and concepts that share no name with it; a share of them from its own group."""
        concept = self._corpus.concepts[first]
        names = {text.lower() for text in concept.en + concept.zh}
        near = self._by_group[concept.group]
        chosen = [first]
        for _ in range(count * 20):
            if len(chosen) == count:
                break
            close = rng.random() < hard and len(near) > 4
            other = rng.choice(
                near
                if close
                else self._by_kind[concept.kind]
                if rng.random() < 0.8
                else list(self._by_concept)
            )
            texts = {
                text.lower() for text in self._corpus.concepts[other].en + self._corpus.concepts[other].zh
            }
            if other not in chosen and not names & texts:
                chosen.append(other)
        return chosen

    def _draw_images(self, rng: random.Random, count: int, hard: float) -> tuple[list[int], list[int]]:
        concepts = self._draw_concepts(rng, count, hard)
        first = rng.choice(self._by_concept[concepts[0]])
        source = self._corpus.source_of[first]
        alike = rng.random() < 0.6
        images = [first]
        for concept in concepts[1:]:
            own = [i for i in self._by_concept[concept] if not alike or self._corpus.source_of[i] == source]
            images.append(rng.choice(own or self._by_concept[concept]))
        return concepts, images

    def _dress(self, concept: int, image: int, rng: random.Random) -> Entry:
        roll = rng.random()
        if roll < 0.4:
            return Entry(image=image)
        text = self._caption(concept, rng)
        return Entry(text) if roll < 0.75 else Entry(text, image)

    def _caption(self, concept: int, rng: random.Random) -> str:
        return pick_caption(self._corpus.concepts[concept], rng)

    @staticmethod
    def _list_keywords(concept: Concept) -> set[str]:
        names = {word for text in concept.en for word in text.lower().split() if len(word) > 2}
        return {word.lower() for word in concept.keywords_en + concept.keywords_zh} | names


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def _settle(query: Entry, candidates: list[Entry]) -> Row:
    """The first candidate is the right one."""
    return Row(query, tuple(candidates), (1.0,) + (0.0,) * (len(candidates) - 1))
