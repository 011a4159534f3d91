"""The classifier finds hate in other words than the lists have, wherever it stands; without its weights it has failed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from service.screening.calibration import load_calibration
from service.screening.judge import measure
from service.screening.reading import describe
from service.screening.text import DETECTORS, Reader
from service.screening.text.classifier import (
    BITS,
    DETECTOR,
    PIECE,
    SHORTEST,
    WEIGHTS,
    Classifier,
    ClassifierMissing,
    grams,
    scan,
)
from service.screening.text.views import view
from tenants.risk import Category

HATEFUL = {
    "en": "Women are stupid whores who belong in the kitchen, every one of these sluts.",
    "zh": "这些黑人又脏又臭，滚回非洲去，恶心的垃圾。",
}
HARMLESS = {
    "en": (
        "The kettle boils in three minutes and switches itself off. Rinse the filter under warm water once a week. "
        "The museum opens at nine; tickets are sold at the gate. The train to the coast leaves every hour. "
    ),
    "zh": "这款水壶三分钟即可烧开，并自动断电。每周用温水清洗一次滤网。博物馆九点开门，门票在入口处出售。",
}
NEUTRAL = (
    "I am a gay man.", "Muslim families celebrated the end of Ramadan.", "The shop is owned by a Black woman.",
    "Refugees from three countries live in the village.", "She is deaf and teaches sign language.",
    "My grandmother was Jewish and came from Vienna.", "Mexican immigrants opened a bakery.",
    "The clinic treats trans patients with respect.",
    "我是一名同性恋者。", "穆斯林家庭庆祝开斋节。", "这家店的老板是一位黑人女性。",
    "村里住着来自三个国家的难民。", "她是聋人，教手语。", "来自河南的工人回家过年。", "残疾人可以使用这个入口。",
)  # fmt: skip


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.read()


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


def raw(classifier: Classifier, *texts: str) -> list[float]:
    return classifier.score([view(text) for text in texts])


def hate(reader: Reader, text: str) -> float:
    """As it is judged."""
    (findings,) = reader.read((text,))
    assert findings.failed == ()
    risks = measure(findings, load_calibration())
    return max((risk.score for risk in risks if risk.category is Category.HATE), default=0.0)


@pytest.mark.parametrize("language", HATEFUL)
def test_hate_is_told_from_harmless_text(classifier: Classifier, language: str) -> None:
    hateful, harmless = raw(classifier, HATEFUL[language], HARMLESS[language])
    assert hateful > 0.4
    assert harmless < 0.05


@pytest.mark.parametrize("text", NEUTRAL)
def test_naming_a_group_is_no_hate(reader: Reader, text: str) -> None:
    assert hate(reader, text) < 0.3


@pytest.mark.parametrize("language", HATEFUL)
@pytest.mark.parametrize("before", [0, 1, 37, 5_000, 9_990, PIECE - 40, PIECE + 3])
def test_harmless_text_around_a_sentence_does_not_hide_it(
    classifier: Classifier, language: str, before: int
) -> None:
    around = HARMLESS[language] * (2 + 2 * PIECE // len(HARMLESS[language]))
    padded = f"{around[:before]} {HATEFUL[language]} {around[before : before + 10_000]}"
    alone, within = raw(classifier, HATEFUL[language], padded)
    assert within > 0.3
    assert within > 0.6 * alone


@given(
    st.lists(
        st.sampled_from([*HATEFUL.values(), *HARMLESS.values(), "", "x", "猫", "b0mb 5ale"]), max_size=12
    )
)
@settings(max_examples=50)
def test_a_text_scores_the_same_in_any_company(classifier: Classifier, texts: list[str]) -> None:
    together = raw(classifier, *texts)
    assert together == pytest.approx([raw(classifier, text)[0] for text in texts])


@given(st.lists(st.text(st.characters(), max_size=400), max_size=6))
def test_any_text_has_a_score(classifier: Classifier, texts: list[str]) -> None:
    assert all(0.0 < score < 1.0 for score in raw(classifier, *texts))


@pytest.mark.parametrize(
    "disguise", ["\u200b".join, str.upper, lambda text: text.replace("o", "о").replace("e", "е")]
)
def test_what_folding_undoes_changes_no_score(classifier: Classifier, disguise: object) -> None:
    assert callable(disguise)
    plain, disguised = raw(classifier, HATEFUL["en"], disguise(HATEFUL["en"]))
    assert disguised == pytest.approx(plain)


def test_it_is_never_clear_by_itself(reader: Reader) -> None:
    assert hate(reader, f"{HATEFUL['en']} " * 40) < 0.8


def test_it_speaks_of_hate_alone_and_names_no_word(reader: Reader) -> None:
    (findings,) = reader.read((HATEFUL["zh"],))
    told = [signal for signal in findings.signals if signal.detector == DETECTOR]
    assert [(signal.category, signal.rule) for signal in told] == [(Category.HATE, "classifier.hate")]


def test_the_weights_are_small_and_those_that_are_pinned(classifier: Classifier) -> None:
    assert WEIGHTS.stat().st_size <= 1.5 * 2**20
    assert np.count_nonzero(classifier.weights) > 100_000


def test_weights_that_are_missing_altered_or_others_are_not_read(tmp_path: Path) -> None:
    whole = WEIGHTS.read_bytes()
    altered, other = tmp_path / "altered", tmp_path / "other"
    altered.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    other.write_bytes(save({"weights": np.zeros(8, np.int8)}))
    for path in (tmp_path / "none", altered, other):
        with pytest.raises(ClassifierMissing):
            Classifier.read(path)


def test_without_its_weights_it_has_failed_on_every_text_and_the_others_read(tmp_path: Path) -> None:
    reader = Reader(weights=tmp_path / "none")
    plain, drug = reader.read(("a recipe for apple cake", "cocaine"))
    assert plain.failed == drug.failed == (DETECTOR,)
    assert [signal.rule for signal in drug.signals] == ["lexicon.drugs-en"]
    told = {detector.name: detector.active for detector in describe(reader)}
    assert told == {name: name != DETECTOR for name in DETECTORS}
    of_tenant = reader.with_lexicon(reader.lexicon.with_lists([]))
    assert of_tenant.read(("a recipe",))[0].failed == (DETECTOR,)


def test_one_that_raises_has_failed_and_the_others_read(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(Classifier, "search", broken)
    (findings,) = reader.read(("cocaine",))
    assert findings.failed == (DETECTOR,)
    assert [signal.rule for signal in findings.signals] == ["lexicon.drugs-en"]


@pytest.mark.parametrize("text", ["Hello big world", "你好，世界 abc", "k1ll them", "x", "", "the the the"])
def test_a_short_text_weighs_what_its_n_grams_do(text: str) -> None:
    """What is scored is what was trained: the same n-grams, whoever stands beside the text."""
    weights = np.random.default_rng(0).integers(-127, 127, 2**BITS).astype(np.int8)
    scanned = scan(view(text))
    expected = weights[grams(scanned)].sum(dtype=np.int64) / np.sqrt(max(len(scanned), SHORTEST))
    scored = raw(Classifier(weights, np.array([[0.001, 0.0]] * 2)), "another text", text, "别的文字")[1]
    assert np.log(scored / (1 - scored)) == pytest.approx(0.001 * expected)
