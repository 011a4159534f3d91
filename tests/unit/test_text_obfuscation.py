"""A word stays found however it is written: twelve disguises in English, five in Chinese; and prose stays clean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.disguises import DISGUISES, WORDS
from service.screening.text import Reader
from service.screening.text.folding import SOUNDS, fold, sounds
from service.screening.text.views import view
from service.screening.text.write_hanzi_sounds import hanzi_sounds
from tenants.risk import Category


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


def found(reader: Reader, text: str) -> dict[Category, float]:
    (findings,) = reader.read((text,))
    assert findings.failed == ()
    return {signal.category: signal.score for signal in findings.signals}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_disguised_word_is_found_as_the_plain_one_is(reader: Reader, disguise: str) -> None:
    for word in WORDS:
        plain = found(reader, f"They were talking about a {word} in the kitchen.")
        disguised = found(reader, f"They were talking about {DISGUISES[disguise](word)} in the kitchen.")
        assert plain, word
        assert plain.keys() <= disguised.keys(), word


@pytest.mark.parametrize(
    "text",
    [
        "有人出售枪支弹药，货到付款",
        "有人出售槍支彈藥，貨到付款",  # traditional
        "有人出售枪*支*弹*药",
        "有人 出 售 枪 支 弹 药",
        "有人出，售，枪，支，弹，药",
        "有人出售枪\u200b支弹\u200b药",
        "有人出售木仓支弓单药",  # parts of characters
        "有人出售腔之蛋要",  # the same sounds
        "you ren chu shou qiang zhi dan yao",
        "chushouqiangzhidanyao",
    ],
)
def test_a_chinese_phrase_is_found_in_every_spelling(reader: Reader, text: str) -> None:
    assert found(reader, text)[Category.WEAPONS] >= 0.6


@pytest.mark.parametrize(
    "text",
    [
        "The town of Scunthorpe lies in Lincolnshire, near Penistone and Clitheroe.",
        "Kill the Python process, then restart it.",
        "Her killer album topped the charts; the assassin bug ate the aphid.",
        "Essex and Sussex cricket, with Dick Van Dyke as a guest.",
        "The cocktail bar in Shitterton serves assorted canapés.",
        "Classic bass grass passes; the analysis of Arsenal's assets.",
        "He found a chink in the armour.",
        "Flame retardants retard the spread of fire.",
        "A bath bomb, a seed bomb and a photo bomb.",
        "The bomb squad used an exhaust silencer as an example.",
        "这把手枪钻和电动螺丝刀一起打折。",
        "电脑中了病毒，需要重装系统。",
        "接口交互文档在第三章，出口交易额上升。",
        "警方打击贩卖毒品，反洗钱工作会议召开。",
        "南京大屠杀纪念馆周一闭馆。",
        "我没有说过这句话，引数写错了。",
        "支援交通建设，增援交警。",
        "v2.4.1 adds utf8 and x86_64 builds, 3D views and H2O.",
        "Call 1-800-555-0199 or write to info@example.org for $5.00 off!!!",
        "I saw a B C D and an E F G on the wall.",
        "Привет, как дела? Мы сегодня говорим о погоде.",
        "これは日本語の文章です。索引の構造について。",
    ],
)
def test_ordinary_sentences_give_nothing(reader: Reader, text: str) -> None:
    assert found(reader, text) == {}


def test_two_syllables_alike_are_no_find(reader: Reader) -> None:
    assert found(reader, "他得了病毒性感冒") == {}
    assert found(reader, "冰毒") != {}


def test_the_view_of_traditional_wide_and_marked_text_is_the_plain_one() -> None:
    assert fold("Ｃａｆé Ａ𝐁𝐜 № 槍").text == "cafe abc no 枪"


def test_sounds_replace_one_for_one() -> None:
    assert sounds("枪支，弹药 abc") == sounds("腔之，蛋要 abc")
    assert len(sounds("枪支，弹药 abc")) == len("枪支，弹药 abc")


def test_the_table_of_sounds_is_what_its_source_gives() -> None:
    assert SOUNDS.read_text("utf-8") == hanzi_sounds()


@given(st.text(st.characters(), max_size=200))
def test_any_text_has_views(text: str) -> None:
    views = view(text)
    assert "\u200b" not in views.folded.text
    assert views.words.startswith(" ") and views.words.endswith(" ")


@given(st.text(st.characters(codec="utf-8"), max_size=120))
def test_what_nobody_sees_changes_nothing(text: str) -> None:
    seen = fold(text)
    strewn = fold("\u2060".join(text))
    assert strewn.text == seen.text
