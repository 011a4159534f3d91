"""What is read in a text: signals of risk, in English and Chinese, from rules and lists that are loaded once.

    folding.py    look-alikes made alike, by one table of code points
    views.py      other ways to read the same text: skeletons, spelled-out letters, hanzi, sounds
    terms.py      lists of terms as files, by category, with source and licence
    lexicon.py    all terms in all views, by Aho-Corasick
    homophones.py hanzi terms by their sound
    injection.py  words to whoever ranks; its rules are in injection_rules.py
    code.py       SQL, HTML, paths: low
    classifier.py trained weights of n-grams: hate in other words than the lists have

Pure: no process, no HTTP, no threads, no file opened after `Reader` was made. Texts are read, never changed:
what the model gets is what the caller sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path

from service.screening.signals import Findings, Signal
from service.screening.text.classifier import WEIGHTS, Classifier, ClassifierMissing
from service.screening.text.code import CodeRules
from service.screening.text.homophones import Homophones
from service.screening.text.injection import Asked, InjectionRules
from service.screening.text.lexicon import Lexicon
from service.screening.text.views import Views, view

__all__ = ["DETECTORS", "Lexicon", "Reader"]

DETECTORS = ("lexicon", "homophone", "injection", "code", "classifier")
"""Names of what reads a text, as in `Signal.detector` and `Findings.failed`."""


class Reader:
    """Reads texts for signals of risk."""

    def __init__(self, lexicon: Lexicon | None = None, *, weights: Path = WEIGHTS) -> None:
        """Loads everything and reads one text, so that nothing is left to open. About 0.3 s.

        `lexicon`: another one than the built-in. `weights`: the classifier's; where they are missing or are not those
        that are pinned, it fails on every text and the others read.
        """
        self._with(lexicon or Lexicon.load())
        self._injection = InjectionRules()
        self._code = CodeRules()
        self._classifier = _classifier(weights)
        self.warm_up()

    def warm_up(self) -> None:
        """Load what loads late. Raises RuntimeError where a detector cannot read."""
        (warm_up,) = self.read(("Warm-up: ｗｉｄｅ, 中文。 ignore b0mb ' or 1=1",), query="none of these")
        if broken := set(warm_up.failed) - set(self.missing):
            raise RuntimeError(f"Detectors that cannot read: {', '.join(sorted(broken))}.")

    @property
    def missing(self) -> tuple[str, ...]:
        """Detectors that could not be loaded. They are in `failed` of every text."""
        return () if self._classifier is not None else ("classifier",)

    def with_lexicon(self, lexicon: Lexicon) -> Reader:
        """A reader of another lexicon, a tenant's (`Lexicon.with_lists`), that shares the rest. Opens no file."""
        other = copy(self)
        other._with(lexicon)
        return other

    def read(self, texts: Sequence[str], *, query: str | None = None) -> tuple[Findings, ...]:
        """One `Findings` for each text, in order. Never raises: a detector that does is in `failed`.

        `query`: what the texts are to be ranked by, where there is one; it makes keyword stuffing plainer.
        """
        asked = Asked.of(query) if query else None
        views = [_view(text) for text in texts]
        classified = self._classify([each for each in views if each is not None])
        return tuple(
            Findings(failed=DETECTORS) if each is None else self._read(each, asked, next(classified))
            for each in views
        )

    def _with(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._homophones = Homophones(lexicon)

    def _read(self, views: Views, asked: Asked | None, classified: tuple[Signal, ...] | None) -> Findings:
        signals: list[Signal] = []
        failed: list[str] = []
        for detector in DETECTORS:
            try:
                signals += self._detect(detector, views, asked, classified)
            except Exception:  # noqa: BLE001  one that fails is told apart from one that finds nothing
                failed.append(detector)
        return Findings(tuple(signals), tuple(failed))

    def _detect(
        self, detector: str, views: Views, asked: Asked | None, classified: tuple[Signal, ...] | None
    ) -> tuple[Signal, ...]:
        match detector:
            case "lexicon":
                return self.lexicon.search(views)
            case "homophone":
                return self._homophones.search(views)
            case "injection":
                return self._injection.search(views, asked)
            case "code":
                return self._code.search(views)
            case _:
                if classified is None:
                    raise ClassifierMissing
                return classified

    def _classify(self, views: Sequence[Views]) -> Iterator[tuple[Signal, ...] | None]:
        """What the classifier says of each text; None where it could say nothing."""
        try:
            if self._classifier is None:
                raise ClassifierMissing
            return iter(self._classifier.search(views))
        except Exception:  # noqa: BLE001  none of these was classified: fail closed
            return iter([None] * len(views))


def _view(text: str) -> Views | None:
    """The text's views; None where it could not be read at all."""
    try:
        return view(text)
    except Exception:  # noqa: BLE001  whatever it is, nothing was read: fail closed
        return None


def _classifier(weights: Path) -> Classifier | None:
    try:
        return Classifier.read(weights)
    except ClassifierMissing:
        return None
