"""The process that reads untrusted texts: strings in, findings out. Started by `readers.py` as `python -m`.

A process of its own, so that a text never waits behind an image that takes long to decode. It loads every list and
table that it will ever need, reads one text, locks itself in as a child that decodes images does, and reads once more.
It never logs what it was sent.

A tenant's own lists travel with the request. The readers made of them are kept, a few, by the lists themselves: two
tenants with the same lists share a reader, which keeps nothing of any text.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial

from service.processes.lock import lock_in
from service.processes.parent import Parent, name_process
from service.processes.wire import COMMON, Detector, Failure, Hello, Limits, Vocabulary
from service.screening.signals import Findings
from service.screening.text import DETECTORS, Reader
from service.screening.text.classifier import DIGEST
from service.screening.text.folding import fold
from service.screening.text.terms import Level, Term, TermList
from tenants.risk import Category

READER_UID = 64_792
"""A user of its own, in a range that no distribution hands out."""
ADDRESS_SPACE_BYTES = 1024 * 1024 * 1024
READERS_KEPT = 8
"""Of tenants with lists of their own. One takes some 30 MB."""
MOST_CHARACTERS = 256 * 1024
"""Of one request, but for a single text that is longer: others wait meanwhile."""
FRAME_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class OwnList:
    """A tenant's words of one category."""

    category: Category
    words: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Read these texts, which are to be ranked by `query` where there is one; it may be among them."""

    id: int
    texts: tuple[str, ...] = field(repr=False)
    query: str | None = field(default=None, repr=False)
    lists: tuple[OwnList, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadReply:
    """One `Findings` for each text, in order."""

    id: int
    findings: tuple[Findings, ...]


VOCABULARY = Vocabulary(
    *COMMON,
    ReadRequest,
    ReadReply,
    limits=Limits(envelope_bytes=FRAME_BYTES, frame_bytes=FRAME_BYTES),
)


def main(arguments: list[str]) -> None:
    """`fd parent_pid`."""
    fd, parent_pid = (int(argument) for argument in arguments)
    parent = Parent(fd, parent_pid, VOCABULARY)
    name_process("reader")
    reader = Reader()
    for name in reader.missing:
        sys.stderr.write(f"the text detector {name} has no weights, or not those that are pinned\n")
    shelf = Shelf(reader)
    measures = lock_in(parent, uid=READER_UID, address_space_bytes=ADDRESS_SPACE_BYTES)
    reader.warm_up()
    gc.freeze()
    parent.send(Hello(pid=os.getpid(), sandbox=measures, detectors=describe(reader)))
    parent.serve(partial(answer, shelf=shelf))


class Shelf:
    """The reader of the lists that come with the service, and those of tenants with lists of their own."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._kept: OrderedDict[tuple[OwnList, ...], Reader] = OrderedDict()

    def reader(self, lists: tuple[OwnList, ...]) -> Reader:
        """The reader for these lists. Raises `ValueError` where they hold what is no term."""
        if not lists:
            return self._reader
        kept = self._kept.get(lists)
        if kept is None:
            kept = self._reader.with_lexicon(
                self._reader.lexicon.with_lists([term_list(each) for each in lists])
            )
            self._kept[lists] = kept
            while len(self._kept) > READERS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(lists)
        return kept


def answer(message: object, shelf: Shelf) -> ReadReply | Failure:
    """What to say to one message. Lists that make no lexicon are a detector that failed, on every text."""
    if not isinstance(message, ReadRequest):
        return Failure(getattr(message, "id", 0), "not_asked")
    try:
        reader = shelf.reader(message.lists)
    except ValueError:
        return ReadReply(message.id, (Findings(failed=("lexicon",)),) * len(message.texts))
    others = tuple(text for text in message.texts if text != message.query)
    found = iter(reader.read(others, query=message.query))
    # A query is not compared with itself: of course it is stuffed with its own words.
    of_query = reader.read((message.query,)) if len(others) < len(message.texts) and message.query else ()
    return ReadReply(
        message.id, tuple(of_query[0] if text == message.query else next(found) for text in message.texts)
    )


def term_list(own: OwnList) -> TermList:
    """A tenant's words as a list. Whoever wrote them meant them: each is clear by itself."""
    terms = {}
    for word in own.words:
        text = " ".join("".join(c if c.isalnum() else " " for c in fold(word).text).split())
        if len(text) < 2:
            raise ValueError("a term has at least two letters")
        terms[text] = Term(text, Level.SEVERE)
    return TermList(
        f"own-{own.category}", own.category, "any", "the tenant", "the tenant's own", tuple(terms.values())
    )


def describe(reader: Reader) -> tuple[Detector, ...]:
    """What is read with, the version of each, and what is missing."""
    versions = {"lexicon": reader.lexicon.digest[:16], "classifier": DIGEST[:16]}
    return tuple(
        Detector(name, active=name not in reader.missing, version=versions.get(name, "1"))
        for name in DETECTORS
    )


if __name__ == "__main__":
    main(sys.argv[1:])
