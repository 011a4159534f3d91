"""Makes look-alikes alike: a text, as it would be read, in few and plain characters. For scanning only.

What nobody sees (format characters, tags, combining marks) is dropped, compatibility forms become plain ones
(NFKD, UAX #15), letters that look like ASCII become ASCII (after Unicode's confusables.txt, UTS #39), case is
folded and traditional hanzi become simplified. All of that is one table of code points, built once and applied by
NumPy: a few nanoseconds a character. A second table gives each hanzi's toneless sound. Both are built at first use,
which is to be before the process locks itself in: see `Reader`.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import opencc

CodePoints = npt.NDArray[np.uint32]

SOUNDS = Path(__file__).with_name("hanzi_sounds.txt")
HANZI_FIRST, HANZI_LAST = 0x3400, 0x9FFF
TABLED = 0x30000
"""Code points below have an entry of their own; those above stay as they are, or are dropped as tags."""

_DROPPED = 0xFFFF_FFFF
_EXPANDS = 0xFFFF_FFFE
"""Stands for several characters (a ligature, a squared word): the text goes the slow way, by `unicodedata`."""

_TAGS = range(0xE0000, 0xE1000)
"""Tags and variation selectors: never drawn. ASCII can be hidden in the first 128 (UTS #51, annex C)."""
_FLAG = 0x1F3F4
"""The black flag that opens a flag made of tags, their only use in honest text."""

_ASCII_BLANKS = b"\x0b\x0c\x1c\x1d\x1e\x1f"
_ASCII_CONTROLS = bytes(c for c in (*range(32), 127) if c not in b"\t\n\r" + _ASCII_BLANKS)
_ASCII_LOWER = bytes(32 if c in _ASCII_BLANKS else ord(chr(c).lower()) for c in range(128)) + bytes(128)

_INVISIBLE_LETTERS = (0x115F, 0x1160, 0x3164, 0xFFA0, 0x034F)
_BLANK = (0x2800,)

_CONFUSABLES = str.maketrans(
    # Cyrillic, then Greek, Armenian, Latin outside ASCII, each already lower case
    "авекмнорстухіјѕԁԛԝһѵӏґɡ" + "αβεικνορτυχηωγ" + "օսոհցզ" + "ıɑɩɪʟɴʀᴀʙᴄᴅᴇꜰɢʜᴊᴋᴍᴏᴘꜱᴛᴜᴠᴡʏᴢøđħłŧƀɓɖɗǝəꞵʋ",
    "abekmhopctyxijsdqwhvlrg" + "abeikvoptuxnwy" + "ounhgq" + "iaiilnrabcdefghjkmopstuvwyzodhltbbddeebv",
)
_ENCLOSED = {first + k: 0x61 + k for first in (0x1F150, 0x1F170, 0x1F1E6) for k in range(26)}
"""Negative circled, negative squared and regional letters: no compatibility form, and read as letters."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A text as it would be read."""

    text: str
    """Lower case, without invisible characters. Line breaks and punctuation are kept."""
    hidden: int
    """Tag characters that no flag explains: text that a person does not see and a model may."""
    hidden_text: str
    """What they spell."""
    overrides: int
    """Characters that turn the direction of writing around (U+202D, U+202E)."""


def fold(text: str) -> Folded:
    """`text` as it would be read. Never raises on any `str`, lone surrogates included."""
    if text.isascii():
        return Folded(text.encode().translate(_ASCII_LOWER, _ASCII_CONTROLS).decode(), 0, "", 0)
    codes = _codes(text)
    hidden = _hidden(codes) if codes.max() > _TAGS.start else ""
    overrides = text.count("\u202d") + text.count("\u202e")
    folded = _lookup(codes)
    if folded.max() >= _EXPANDS:  # most texts have neither
        if (folded == _EXPANDS).any():
            folded = _lookup(_codes(unicodedata.normalize("NFKD", text).casefold()))
        folded = folded[folded < _EXPANDS]
    return Folded(_text(folded), len(hidden), hidden, overrides)


def sounds(text: str) -> str:
    """`text`, folded before, with each hanzi replaced by the first hanzi of the same toneless sound.

    One character for one, so that offsets stay. What has no known sound stays itself.
    """
    codes = _codes(text)
    table = _sound_table()
    if not len(codes) or codes.max() < len(table):
        return _text(table[codes])
    known = codes < len(table)
    return _text(np.where(known, table[np.where(known, codes, 0)], codes))


@cache
def syllables() -> dict[str, str]:
    """By hanzi (U+4E00 to U+9FFF), its commonest reading without tones, as written by `write_hanzi_sounds.py`."""
    by_hanzi: dict[str, str] = {}
    for line in SOUNDS.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            syllable, hanzi = line.split(" ")
            by_hanzi.update(dict.fromkeys(hanzi, syllable))
    return by_hanzi


def _codes(text: str) -> CodePoints:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _text(codes: CodePoints) -> str:
    return codes.astype("<u4", copy=False).tobytes().decode("utf-32-le", "surrogatepass")


def _lookup(codes: CodePoints) -> CodePoints:
    table = _fold_table()
    if len(codes) and codes.max() >= TABLED:
        tags = (codes >= _TAGS.start) & (codes < _TAGS.stop)
        low = codes < TABLED
        return np.where(tags, _DROPPED, np.where(low, table[np.where(low, codes, 0)], codes)).astype(
            np.uint32
        )
    return table[codes]


def _hidden(codes: CodePoints) -> str:
    """The ASCII that tag characters spell, but for flags: a flag's tags follow U+1F3F4 at once."""
    tags = (codes > 0xE0000) & (codes < 0xE0080)
    if not tags.any():
        return ""
    starts = np.flatnonzero(tags & ~np.concatenate(([False], tags[:-1])))
    ends = np.flatnonzero(tags & ~np.concatenate((tags[1:], [False]))) + 1
    spelled = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        # England's flag is the black flag, five letters and an end mark; no subdivision's code is longer.
        if start > 0 and codes[start - 1] == _FLAG and end - start <= 7:
            continue
        spelled.append("".join(chr(int(code) - 0xE0000) for code in codes[start:end]))
    return "".join(spelled)


@cache
def _fold_table() -> CodePoints:
    """[code points] what each is read as. Built once, in about a tenth of a second."""
    table = np.arange(TABLED, dtype=np.uint32)
    simplify = opencc.OpenCC("t2s")
    hanzi = [chr(code) for code in range(HANZI_FIRST, HANZI_LAST + 1)]
    for old, new in zip(hanzi, simplify.convert("\n".join(hanzi)).split("\n"), strict=True):
        if len(new) == 1:
            table[ord(old)] = ord(new)
    for first, last in ((0, HANZI_FIRST), (0xA000, 0xAC00), (0xF900, 0x10000), (0x1D400, 0x1D800)):
        for code in range(first, last):
            table[code] = _read_as(code, table)
    for first, last in ((0x1F100, 0x1F200), (0x2F800, 0x2FA20)):
        for code in range(first, last):
            table[code] = _read_as(code, table)
    table[0xD800:0xE000] = 0xFFFD  # half of a pair: no text of UTF-8, and nothing else takes it
    for code in _INVISIBLE_LETTERS:
        table[code] = _DROPPED
    for code in _BLANK:
        table[code] = 0x20
    table.setflags(write=False)
    return table


def _read_as(code: int, hanzi: CodePoints) -> int:
    if code in _ENCLOSED:
        return _ENCLOSED[code]
    character = chr(code)
    category = unicodedata.category(character)
    if category == "Cc":
        return code if character in "\t\n\r" else (0x20 if character.isspace() else _DROPPED)
    if category in ("Cf", "Mn", "Me"):
        return _DROPPED
    if category in ("Zs", "Zl", "Zp"):
        return 0x20 if category == "Zs" else 0x0A
    if category in ("Cs", "Co", "Cn"):
        return code
    plain = unicodedata.normalize("NFKD", character).casefold()
    plain = "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    plain = plain.translate(_CONFUSABLES)
    if len(plain) != 1:
        return _EXPANDS if plain else _DROPPED
    return int(hanzi[ord(plain)]) if HANZI_FIRST <= ord(plain) <= HANZI_LAST else ord(plain)


@cache
def _sound_table() -> CodePoints:
    """[code points below 0xA000] the first hanzi that sounds the same."""
    table = np.arange(HANZI_LAST + 1, dtype=np.uint32)
    first: dict[str, int] = {}
    for hanzi, syllable in syllables().items():
        table[ord(hanzi)] = first.setdefault(syllable, ord(hanzi))
    table.setflags(write=False)
    return table
