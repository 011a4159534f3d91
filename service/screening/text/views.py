"""Other ways to read a text, for scanning only: the text itself is never changed.

    words    lower-case words between single spaces, one space at either end, so that " word " finds whole words
    odd      words that may be bent: 5p3lled with digits, streeetched; `bend` gives their skeletons on demand
    runs     s.p.e.l.l.e.d out letters, joined
    hanzi    what is written in hanzi, with what was put between characters taken out
    sounds   the same, each hanzi replaced by the first one that sounds alike

The common text is plain English prose: for it `odd`, `runs`, `hanzi` and `sounds` are empty, and finding that
out costs a few passes of C code. Everything is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from service.screening.text.folding import Folded, fold, sounds

LEET = str.maketrans("013456789@$!|+€¢£¥", "oieasgtbgasiiteciy")
"""Digits and signs by the letter that they stand for; 1, ! and | are i, and so is l in a skeleton."""

_SIGNS = b"@$!|+"
_WORD_BYTES = bytes(c if chr(c).isalnum() else 32 for c in range(128)) + bytes(128)
_TOKEN_BYTES = bytes(c if chr(c).isalnum() or c in _SIGNS else 32 for c in range(128)) + bytes(128)
_LENGTH_BYTES = bytes(119 if chr(c).isalnum() else 32 for c in range(128)) + bytes(128)
"""ASCII as words, as words that keep the signs of leet, and as a row of w's where words are."""

_HANZI = "\u3400-\u9fff"
_ANY_WORD = re.compile(rf"[^\W_{_HANZI}]+")
_ANY_TOKEN = re.compile(rf"(?:[^\W_{_HANZI}]|[@$!|+€¢£¥])+")
_SIGN = re.compile("[@$!|+€¢£¥]")
_STRETCHED = re.compile(r"([^\W\d])\1\1")
_DOUBLED = re.compile(r"([^\W\d])\1+")
_HAS_HANZI = re.compile(rf"[{_HANZI}]")
_BETWEEN_HANZI = re.compile(rf"(?<=[{_HANZI}])[*_.·•・~^|/\\#=+`'\"…—-]{{1,3}}(?=[{_HANZI}])")
_SPELLED_HANZI = re.compile(rf"(?<!\w)[{_HANZI}](?:\W{{1,3}}[{_HANZI}](?!\w)){{2,40}}")
_NOT_WORD = re.compile(r"\W+")

_COMPONENTS = {
    "木仓": "枪",
    "火乍": "炸",
    "弓单": "弹",
    "贝者": "赌",
    "贝反": "贩",
    "女票": "嫖",
    "女干": "奸",
    "女支": "妓",
    "乂木": "杀",
    "石肖": "硝",
    "氵每": "海",
    "禾中": "种",
}
"""Hanzi written as two that stand beside each other (拆字); only those that are in a lexicon's words."""

PHRASE_WORDS = 8
"""Words of the longest phrase that a list may hold. Around a bent word, that far is read again."""

SPELLED_LETTERS = 40
"""Letters of one spelled-out run that are joined; what follows is a run of its own."""


@dataclass(frozen=True, slots=True)
class Views:
    """One text, read in several ways. All are folded (`folding`)."""

    folded: Folded
    words: str
    word_list: list[str]
    """The words of `words`; not to be changed."""
    tokens: list[str]
    """Words that keep the signs of leet."""
    odd: list[int]
    """Which of `tokens` may be bent."""
    runs: str
    """One run a line."""
    hanzi: str
    sounds: str


def view(text: str) -> Views:
    """All views of one text. Never raises on any `str`."""
    folded = fold(text)
    plain = folded.text
    if plain.isascii():
        raw = plain.encode()
        tokens_raw, words_raw = raw.translate(_TOKEN_BYTES), raw.translate(_WORD_BYTES)
        words = words_raw.decode().split()
        tokens = words if tokens_raw == words_raw else tokens_raw.decode().split()
        hanzi = ""
    else:
        words = _ANY_WORD.findall(plain)
        tokens = _ANY_TOKEN.findall(plain) if _SIGN.search(plain) else words
        hanzi = _hanzi(plain)
    joined = f" {' '.join(words)} "
    return Views(
        folded,
        joined,
        words,
        tokens,
        _odd(words, tokens, joined),
        _runs(words, joined),
        hanzi,
        sounds(hanzi) if hanzi else "",
    )


def skeleton(word: str) -> str:
    """What is left of a word (or words) when digits are read as letters, l as i, and doubled letters as one."""
    if not word.isalnum():
        word = word.strip("!|")
    return _skeleton(word)


def _skeleton(word: str) -> str:
    return _DOUBLED.sub(r"\1", word.translate(LEET).replace("l", "i"))


def bend(views: Views, odd: Iterable[int]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Skeletons of the tokens `odd` and their neighbours, between single spaces; and where those of `odd` lie.

    A find that touches none of the spans is no news: neighbours are there for phrases.
    """
    bent = set(odd)
    near = {other for index in bent for other in range(index - PHRASE_WORDS + 1, index + PHRASE_WORDS)}
    parts = [" "]
    spans = []
    length, previous = 1, -1
    for index in sorted(near & set(range(len(views.tokens)))):
        if index > previous + 1:
            parts.append("\n ")  # no phrase reaches over this
            length += 2
        part = f"{skeleton(views.tokens[index])} "
        if index in bent:
            spans.append((length, length + len(part) - 1))
        parts.append(part)
        length += len(part)
        previous = index
    for index in sorted(bent):
        if views.tokens[index].endswith(
            ("!", "|")
        ):  # the mark of a sentence's end, or the last letter of a word
            part = f"{_skeleton(views.tokens[index])} "
            parts.append(f"\n {part}")
            spans.append((length + 2, length + 1 + len(part)))
            length += 2 + len(part)
    return "".join(parts), tuple(spans)


def _odd(words: list[str], tokens: list[str], joined: str) -> list[int]:
    odd = []
    if not (joined.replace(" ", "").isalpha() and tokens == words):  # letters alone: the common text
        odd = [index for index, token in enumerate(tokens) if not token.isalpha() and _is_leet(token)]
    if _is_stretched(joined):
        odd += [index for index, token in enumerate(tokens) if _STRETCHED.search(token)]
    return odd


def _is_leet(token: str) -> bool:
    """Whether signs or digits stand among letters. A number, a version, a sign at the end are not that."""
    core = token.strip("!|")
    return not (core.isalpha() or core.isdigit() or not core) and any(map(str.isalpha, core))


def _is_stretched(words: str) -> bool:
    return any(map(words.__contains__, _THREES)) if words.isascii() else bool(_STRETCHED.search(words))


_THREES = tuple(letter * 3 for letter in "abcdefghijklmnopqrstuvwxyz")


def _runs(words: list[str], joined: str) -> str:
    """Three or more words of one letter each, in a row, joined."""
    if joined.isascii() and b" w w w " not in joined.encode().translate(_LENGTH_BYTES):
        return ""
    runs = []
    run: list[str] = []
    for word in [*words, ""]:
        if len(word) == 1 and len(run) < SPELLED_LETTERS:
            run.append(word)
            continue
        if len(run) >= 3:
            runs.append(skeleton("".join(run)))
        run = [word] if len(word) == 1 else []
    return "\n".join(runs)


def _hanzi(plain: str) -> str:
    if not _HAS_HANZI.search(plain):
        return ""
    plain = _BETWEEN_HANZI.sub("", plain)
    plain = _SPELLED_HANZI.sub(lambda match: _NOT_WORD.sub("", match[0]), plain)
    for parts, whole in _COMPONENTS.items():
        plain = plain.replace(parts, whole)
    return plain
