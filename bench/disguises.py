"""Twelve ways to write a word so that a person reads it and a plain search does not find it; and words to try them on."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

WORDS = (
    "faggot", "wetback", "raghead", "blowjob", "gangbang", "cocaine", "heroin", "fentanyl", "grenade", "pornography",
    "hentai", "beheading", "massacre", "hitman", "pipe bomb",
)  # fmt: skip

LEET = str.maketrans("aeiost", "431057")
SYMBOLS = str.maketrans("aist", "@!$+")
CYRILLIC = str.maketrans("aeopcyxi", "аеорсухі")


def stretched(word: str) -> str:
    return "".join(letter * (4 if index == 1 else 1) for index, letter in enumerate(word))


def wide(word: str) -> str:
    return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in word)


def bold(word: str) -> str:
    return "".join(chr(0x1D41A + ord(letter) - 97) if "a" <= letter <= "z" else letter for letter in word)


DISGUISES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "leet": lambda word: word.translate(LEET),
    "symbol leet": lambda word: word.translate(SYMBOLS),
    "spaces": lambda word: " ".join(word.replace(" ", "")),
    "dots": lambda word: ".".join(word.replace(" ", "")),
    "zero width": "\u200b".join,
    "cyrillic": lambda word: word.translate(CYRILLIC),
    "full width": wide,
    "repeats": stretched,
    "math bold": bold,
    "diacritics": lambda word: unicodedata.normalize("NFC", "".join(letter + "\u0301" for letter in word)),
    "mixed": lambda word: stretched(word).translate(CYRILLIC).translate(LEET).title(),
}
