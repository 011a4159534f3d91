"""What is read in a text: signals of risk, in English and Chinese, from rules and lists that are loaded once.

    folding.py    look-alikes made alike, by one table of code points
    views.py      other ways to read the same text: skeletons, spelled-out letters, hanzi, sounds
    terms.py      lists of terms as files, by category, with source and licence
    lexicon.py    all terms in all views, by Aho-Corasick

Pure: no process, no HTTP, no threads, no file opened after `Reader` was made. Texts are read, never changed:
what the model gets is what the caller sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.screening.signals import Findings, Signal
from service.screening.text.lexicon import Lexicon
from service.screening.text.views import view

__all__ = ["DETECTORS", "Lexicon", "Reader"]

DETECTORS = ("lexicon",)
"""Names of what reads a text, as in `Signal.detector` and `Findings.failed`."""


class Reader:
    """Reads texts for signals of risk."""

    def __init__(self, lexicon: Lexicon | None = None) -> None:
        """Loads everything and reads one text, so that nothing is left to open. About 0.3 s.

        `lexicon`: another one than the built-in, say a tenant's (`Lexicon.with_lists`).
        """
        self._lexicon = lexicon or Lexicon.load()
        self.read(("Warm-up: ｗｉｄｅ, 中文。",), query="none")

    def read(self, texts: Sequence[str], *, query: str | None = None) -> tuple[Findings, ...]:
        """One `Findings` for each text, in order. Never raises: a detector that does is in `failed`.

        `query`: what the texts are to be ranked by, where there is one; it makes keyword stuffing plainer.
        """
        return tuple(self._read(text) for text in texts)

    def _read(self, text: str) -> Findings:
        signals: list[Signal] = []
        failed: list[str] = []
        try:
            views = view(text)
        except Exception:  # noqa: BLE001  whatever it is, nothing was read: fail closed
            return Findings(failed=DETECTORS)
        try:
            signals += self._lexicon.search(views)
        except Exception:  # noqa: BLE001
            failed.append("lexicon")
        return Findings(tuple(signals), tuple(failed))
