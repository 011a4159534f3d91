"""Writes `hanzi_sounds.txt`, for developers: `python -m service.screening.text.write_hanzi_sounds`.

Each hanzi's commonest reading without its tone, after the single-character dictionary of pypinyin (MIT). A file,
because importing pypinyin takes a quarter of a second and some 40 MB for phrases that nothing here needs.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict

from service.screening.text.folding import SOUNDS

FIRST, LAST = 0x4E00, 0x9FFF

HEADER = """\
# source: pypinyin (https://github.com/mozillazg/python-pinyin), single-character dictionary, first reading
# licence: MIT, Copyright (c) 2016 mozillazg, 闲耘 <hotoo.cn@gmail.com>
# A toneless syllable, then every hanzi (U+4E00 to U+9FFF) whose commonest reading it is; v stands for ü.
"""


def hanzi_sounds() -> str:
    """The file's text."""
    from pypinyin.pinyin_dict import pinyin_dict

    hanzi_of: dict[str, list[str]] = defaultdict(list)
    for code in range(FIRST, LAST + 1):
        if readings := pinyin_dict.get(code):
            hanzi_of[_toneless(readings.split(",")[0])].append(chr(code))
    return HEADER + "".join(f"{syllable} {''.join(hanzi_of[syllable])}\n" for syllable in sorted(hanzi_of))


def _toneless(reading: str) -> str:
    parts = unicodedata.normalize("NFD", reading).replace("u\u0308", "v")
    return "".join(c for c in parts if not unicodedata.combining(c))


if __name__ == "__main__":
    SOUNDS.write_text(hanzi_sounds(), "utf-8")
