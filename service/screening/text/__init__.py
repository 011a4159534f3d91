"""What is read in a text: signals of risk, in English and Chinese, from rules and lists that are loaded once.

    folding.py    look-alikes made alike, by one table of code points
    views.py      other ways to read the same text: skeletons, spelled-out letters, hanzi, sounds
    terms.py      lists of terms as files, by category, with source and licence
    lexicon.py    all terms in all views, by Aho-Corasick
    homophones.py hanzi terms by their sound
    injection.py  words to whoever ranks; its rules are in injection_rules.py
    code.py       SQL, HTML, paths: low

Pure: no process, no HTTP, no threads, no file opened after `Reader` was made. Texts are read, never changed:
what the model gets is what the caller sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.screening.signals import Findings, Signal
from service.screening.text.code import CodeRules
from service.screening.text.homophones import Homophones
from service.screening.text.injection import InjectionRules
from service.screening.text.lexicon import Lexicon
from service.screening.text.views import Views, view

__all__ = ["DETECTORS", "Lexicon", "Reader"]

DETECTORS = ("lexicon", "homophone", "injection", "code")
"""Names of what reads a text, as in `Signal.detector` and `Findings.failed`."""


class Reader:
    """Reads texts for signals of risk."""

    def __init__(self, lexicon: Lexicon | None = None) -> None:
        """Loads everything and reads one text, so that nothing is left to open. About 0.3 s.

        `lexicon`: another one than the built-in, say a tenant's (`Lexicon.with_lists`).
        """
        self.lexicon = lexicon or Lexicon.load()
        self._homophones = Homophones(self.lexicon)
        self._injection = InjectionRules()
        self._code = CodeRules()
        self.warm_up()

    def warm_up(self) -> None:
        """Load what loads late. Raises RuntimeError where a detector cannot read."""
        (warm_up,) = self.read(("Warm-up: ｗｉｄｅ, 中文。 ignore b0mb ' or 1=1",), query="none of these")
        if warm_up.failed:
            raise RuntimeError(f"Detectors that cannot read: {', '.join(warm_up.failed)}.")

    def read(self, texts: Sequence[str], *, query: str | None = None) -> tuple[Findings, ...]:
        """One `Findings` for each text, in order. Never raises: a detector that does is in `failed`.

        `query`: what the texts are to be ranked by, where there is one; it makes keyword stuffing plainer.
        """
        return tuple(self._read(text, query) for text in texts)

    def _read(self, text: str, query: str | None) -> Findings:
        try:
            views = view(text)
        except Exception:  # noqa: BLE001  whatever it is, nothing was read: fail closed
            return Findings(failed=DETECTORS)
        signals: list[Signal] = []
        failed: list[str] = []
        for detector in DETECTORS:
            try:
                signals += self._detect(detector, views, query)
            except Exception:  # noqa: BLE001  one that fails is told apart from one that finds nothing
                failed.append(detector)
        return Findings(tuple(signals), tuple(failed))

    def _detect(self, detector: str, views: Views, query: str | None) -> tuple[Signal, ...]:
        match detector:
            case "lexicon":
                return self.lexicon.search(views)
            case "homophone":
                return self._homophones.search(views)
            case "injection":
                return self._injection.search(views, query)
            case _:
                return self._code.search(views)
