"""Texts of several sentences, and what people ask of them, composed from glosses and from names with their keywords.

There is no passage in the training data, so these are made: a few definitions in a row (English), a few sentences that
say what a thing has to do with (Chinese). A question names the thing, or some words of what is said about it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from models.demo.data import Concept

ASKED_EN = (
    "what is {}?",
    "What is {}?",
    "what does {} mean",
    "define {}",
    "tell me about {}",
    "{} meaning",
    "{}?",
)
ABOUT_EN = (
    "what is {}?",
    "which one is {}?",
    "Which thing is {}?",
    "what do you call {}?",
    "Who or what is {}?",
)
ASKED_ZH = ("{}是什么？", "什么是{}？", "{}是什么意思", "介绍一下{}", "{}和什么有关？")
ABOUT_ZH = ("什么和{}有关？", "哪一个与{}有关？", "说到{}会想到什么？", "{}说的是什么？")
SAID_EN = (
    "{word} is {gloss}",
    "{word}: {gloss}",
    "{word} means {gloss}",
    "By {word} we mean {gloss}",
    "{word}, {gloss}",
)
SAID_ZH = ("{name}和{words}有关", "说到{name}，人们会想到{words}", "{name}：{words}", "{words}都与{name}有关")
_COMMON = (
    "a an and any are as at be been but by can each etc for from has have having he her his in into is it its like not of "
    "off on one or other out over she so some someone something such than that the their them they this those to under "
    "up used usually very was were when where which who whose with without"
)
COMMON = frozenset(_COMMON.split())


@dataclass(frozen=True, slots=True)
class Fact:
    """What one sentence says: a thing's names, and what is said of it."""

    names: tuple[str, ...]
    said: tuple[str, ...]  # one gloss, or keywords
    chinese: bool

    def say(self, rng: random.Random) -> str:
        """The fact as a sentence."""
        if self.chinese:
            words = "、".join(rng.sample(self.said, min(len(self.said), rng.randint(2, 5))))
            return rng.choice(SAID_ZH).format(name=rng.choice(self.names), words=words) + "。"
        text = rng.choice(SAID_EN).format(word=rng.choice(self.names), gloss=self.said[0])
        return text[:1].upper() + text[1:] + "."

    def ask(self, rng: random.Random) -> str:
        """A question that the fact answers: by its name, or by some of what is said of it."""
        by_name = rng.random() < 0.5
        if self.chinese:
            some = "、".join(rng.sample(self.said, min(len(self.said), rng.randint(1, 3))))
            told = rng.choice(self.names) if by_name else some
            return rng.choice(ASKED_ZH if by_name else ABOUT_ZH).format(told)
        if by_name:
            return rng.choice(ASKED_EN).format(rng.choice(self.names))
        words = self.said[0].split()
        size = min(len(words), rng.randint(4, 9))
        start = rng.randint(0, len(words) - size)
        return rng.choice(ABOUT_EN).format(" ".join(words[start : start + size]).strip(",;()"))


def define(entry: tuple[str, str, str]) -> Fact:
    """The fact of a dictionary entry: words, gloss, group."""
    return Fact(tuple(entry[0].split(", ")), (entry[1],), chinese=False)


def describe(concept: Concept) -> Fact:
    """The fact of a concept with Chinese names and keywords."""
    words = tuple(word for word in concept.keywords_zh if word not in concept.zh)
    return Fact(tuple(concept.zh[:2]), words, chinese=True)


def can_describe(concept: Concept) -> bool:
    """Whether there is enough to say of a concept in Chinese."""
    return bool(concept.zh) and sum(word not in concept.zh for word in concept.keywords_zh) >= 2


def compose_passage(fact: Fact, others: list[Fact], rng: random.Random) -> str:
    """A passage in which `fact` stands somewhere among `others`."""
    facts = [fact, *others]
    rng.shuffle(facts)
    return ("" if fact.chinese else " ").join(one.say(rng) for one in facts)


def list_content_words(text: str) -> set[str]:
    """The words of an English text that say something."""
    return {word for word in re.findall(r"[a-z]{3,}", text.lower()) if word not in COMMON}
