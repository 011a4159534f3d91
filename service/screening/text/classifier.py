"""A linear classifier of hate, English and Chinese: weights of n-grams, added up over windows of a text.

    scan       characters of a text in the views that `views` made: words, hanzi, bent words straightened
    n-grams    words, pairs of words, 4 characters; in texts with hanzi also 1 to 3, and 2 or 3 sounds (`folding.sounds`)
    weights    int8 by the hash of an n-gram, in one table; written by `bench/text_classifier.py`, digest pinned here
    windows    of several lengths that overlap; a text scores what its worst window does

What an n-gram weighs is added at the place where it begins, so a window's sum is a difference of two running sums, and
what stands before or after a window has no part in it: harmless text around a sentence does not hide it. All texts of a
request go through NumPy at once. Time is linear in their length.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from service.screening.signals import Signal
from service.screening.text.folding import sounds
from service.screening.text.views import LEET, Views
from tenants.risk import Category

DETECTOR = "classifier"
CATEGORY = Category.HATE
WEIGHTS = Path(__file__).with_name("classifier.safetensors")
DIGEST = "e005f9df3c032b691bcf2cde4dd5aff9164a64e18bb19d775eda7263f0d47a27"
"""SHA-256 of the file `WEIGHTS`."""

BITS = 20
"""A table of 2 ** 20 weights."""
ORDERS = (4,)
HANZI_ORDERS = (1, 2, 3)
SOUND_ORDERS = (2, 3)
"""Characters of an n-gram: in every text; in one with hanzi; of its sounds."""
WINDOWS = ((160, 64), (96, 32), (48, 16))
HANZI_WINDOWS = ((160, 64), (96, 32), (64, 16), (40, 16), (24, 8))
"""Characters of a window, and from one window to the next: in texts without and with hanzi, which say more in less."""
SHORTEST = 16
"""A shorter text is judged as if it were so long: few n-grams are little evidence."""
PIECE = 16_384
"""Characters that go through NumPy at once: what they need stays in the processor's cache."""
LEAST = 0.14
"""A lower score is no signal: it is below a fifth once it is calibrated."""
GAP = 6
"""Blanks between two texts at least, more than the longest n-gram has characters."""
ALIGNED = 64
"""Each text begins at a multiple of this, and so of every step between windows."""

_MULTIPLIER = np.uint32(0x9E37_79B1)
_BASE = np.uint32(0x85EB_CA77)
_WORD_CHARACTERS = 64
"""A longer word is told by its first 63 characters and the sum of the others."""
_PLACES = np.random.default_rng(20).integers(0, 2**32, _WORD_CHARACTERS, np.uint32) | np.uint32(1)
_WORD_OR_EMOJI = re.compile(r"\w+|[\u2600-\u27bf\U0001f300-\U0001faff]")
_HANZI = re.compile("[\u3400-\u9fff]")
_STRETCHED = re.compile(r"([^\W\d])\1\1+")

Codes = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]


class ClassifierMissing(Exception):
    """The classifier's weights are not there, or are not those that are pinned."""


class Classifier:
    """The trained weights, ready to score."""

    def __init__(self, weights: npt.NDArray[np.int8], lines: npt.NDArray[np.float64]) -> None:
        """`weights`: int8 [2 ** BITS]. `lines`: float64 [2, 2], slope and offset for texts without and with hanzi.

        The logit of a window is slope * sum of weights / sqrt(characters) + offset.
        """
        self.weights = weights
        self.lines = lines

    @classmethod
    def read(cls, path: Path = WEIGHTS, digest: str = DIGEST) -> Classifier:
        """The weights in a safetensors file. Raises ClassifierMissing where it is not the one that `digest` pins."""
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise ClassifierMissing("the file is not there") from exc
        if hashlib.sha256(content).hexdigest() != digest:
            raise ClassifierMissing("the file is not the one that is pinned")
        try:
            tensors = load(content)
            weights, lines = tensors["weights"], tensors["lines"]
        except (SafetensorError, KeyError) as exc:
            raise ClassifierMissing("the file holds no classifier") from exc
        ours = weights.shape == (2**BITS,) and lines.shape == (2, 2)
        if not ours or weights.dtype != np.int8 or lines.dtype != np.float64:
            raise ClassifierMissing("the file holds another classifier")
        return cls(weights, lines)

    def search(self, texts: Sequence[Views]) -> tuple[tuple[Signal, ...], ...]:
        """At most one signal for each text, in order."""
        return tuple(
            (Signal(DETECTOR, CATEGORY, round(score, 4), rule=f"{DETECTOR}.{CATEGORY}"),)
            if score >= LEAST
            else ()
            for score in self.score(texts)
        )

    def score(self, texts: Sequence[Views]) -> list[float]:
        """The raw score of each text, 0 to 1: what its worst window has."""
        worst = np.full(len(texts), -np.inf)
        scanned = [scan(views) for views in texts]
        for hanzi in (False, True):
            chosen = [index for index, views in enumerate(texts) if bool(views.hanzi) is hanzi]
            for numbers, pieces in _batches(chosen, scanned):
                np.maximum.at(worst, numbers, self._logits(pieces, hanzi))
        scores: list[float] = (1.0 / (1.0 + np.exp(-worst))).tolist()
        return scores

    def _logits(self, pieces: Sequence[str], hanzi: bool) -> npt.NDArray[np.float64]:
        """[pieces] the logit of the worst window of each."""
        lengths = np.array([len(piece) for piece in pieces])
        rooms = (lengths + GAP + ALIGNED - 1) // ALIGNED * ALIGNED
        begins = np.cumsum(rooms) - rooms
        ends = begins + lengths
        joined = "".join(piece.ljust(room) for piece, room in zip(pieces, rooms.tolist(), strict=True))
        sums = np.zeros(len(joined) + 1, np.int32)
        np.cumsum(self._contributions(joined, ends, hanzi), out=sums[1:])
        worst = np.full(len(pieces), -np.inf)
        for length, step in HANZI_WINDOWS if hanzi else WINDOWS:
            start = np.arange(0, len(joined), step)
            owner = np.searchsorted(begins, start, "right") - 1
            # As many as reach the piece's end, and the first one always.
            kept = (start < ends[owner] - length + step) | (start == begins[owner])
            start, owner = start[kept], owner[kept]
            stop = np.minimum(start + length, ends[owner])
            mean = (sums[stop] - sums[start]) / np.sqrt(np.maximum(stop - start, SHORTEST))
            firsts = np.flatnonzero(start == begins[owner])
            np.maximum(worst, np.maximum.reduceat(mean, firsts), out=worst)
        slope, offset = self.lines[int(hanzi)]
        logits: npt.NDArray[np.float64] = slope * worst + offset
        return logits

    def _contributions(self, joined: str, ends: Places, hanzi: bool) -> npt.NDArray[np.int32]:
        """[characters] the sum of the weights of the n-grams that begin at each."""
        total = np.zeros(len(joined), np.int32)
        for bucket, at in _word_grams(joined):
            total[at] += self.weights.take(bucket)
        for bucket, order in _character_grams(joined, hanzi):
            weight = self.weights.take(bucket)
            for left in range(1, order):  # what begins so near to a text's end is no n-gram of it
                weight[ends - left] = 0
            total[: len(weight)] += weight
        return total


def scan(views: Views) -> str:
    """What is classified: words between single blanks, and what bent words would be, straight, at the end."""
    if views.folded.text.isascii():
        text = views.words
    else:
        text = f" {' '.join(_WORD_OR_EMOJI.findall(views.hanzi or views.folded.text))} "
    if not views.odd:
        return text
    return f"{text}{' '.join(_straighten(views.tokens[index]) for index in views.odd)} "


def grams(text: str) -> Places:
    """The buckets of all n-grams of a scanned text, for whoever trains."""
    found = [bucket for bucket, _ in _word_grams(text)]
    found += [bucket for bucket, _ in _character_grams(text, has_hanzi(text))]
    return np.concatenate(found)


def has_hanzi(text: str) -> bool:
    """Whether any character is one that `folding.sounds` knows."""
    return _HANZI.search(text) is not None


def _word_grams(joined: str) -> Iterator[tuple[Places, Places]]:
    """Buckets of words and of pairs of words, and where each begins: no place twice in one array."""
    codes = _codes(joined)
    blanks = np.flatnonzero(codes == 0x20)
    begin = blanks[:-1]
    if not len(begin):
        return
    since = np.zeros(len(codes), np.int32)
    since[begin] = begin
    np.maximum.accumulate(since, out=since)
    since = np.minimum(np.arange(len(codes), dtype=np.int32) - since, _WORD_CHARACTERS - 1)
    letters = codes * _PLACES.take(since)
    letters[blanks] = 0
    words = np.add.reduceat(letters, begin, dtype=np.uint32)  # [blanks - 1], 0 where two blanks meet
    is_word = words != 0
    yield _bucket(words[is_word]), begin[is_word]
    is_pair = is_word[:-1] & is_word[1:]
    pairs = words[:-1] * _BASE + words[1:] + np.uint32(7)
    yield _bucket(pairs[is_pair]), begin[:-1][is_pair]


def _character_grams(joined: str, hanzi: bool) -> Iterator[tuple[Places, int]]:
    """Buckets of the n-grams that begin at each character, and how many characters they have."""
    yield from _runs(_codes(joined), (*ORDERS, *HANZI_ORDERS) if hanzi else ORDERS, kind=0)
    if hanzi:
        yield from _runs(_codes(sounds(joined)), SOUND_ORDERS, kind=1)


def _runs(codes: Codes, orders: Sequence[int], *, kind: int) -> Iterator[tuple[Places, int]]:
    hashed = codes + np.uint32(0x1000_0000 * (kind + 1))
    for order in range(1, max(orders) + 1):
        if order > 1:
            hashed = hashed[:-1] * _BASE + codes[order - 1 :]
        if order in orders:
            yield _bucket(hashed), order


def _bucket(hashed: Codes) -> Places:
    hashed = (hashed ^ (hashed >> np.uint32(15))) * _MULTIPLIER
    return (hashed >> np.uint32(32 - BITS)).astype(np.int64)


def _batches(chosen: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """The chosen texts and their numbers, some `PIECE` characters at a time; a long one in pieces that overlap."""
    overlap = WINDOWS[0][0]
    numbers: list[int] = []
    pieces: list[str] = []
    room = PIECE
    for index in chosen:
        text = texts[index]
        for start in range(0, max(1, len(text) - overlap), PIECE - overlap):
            piece = text[start : start + PIECE]
            if len(piece) > room and pieces:
                yield numbers, pieces
                numbers, pieces, room = [], [], PIECE
            numbers.append(index)
            pieces.append(piece)
            room -= len(piece)
    if pieces:
        yield numbers, pieces


def _straighten(token: str) -> str:
    """A bent word with letters for digits and signs, and what is stretched written once."""
    return _STRETCHED.sub(r"\1", token.strip("!|").translate(LEET))


def _codes(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
