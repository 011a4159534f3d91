"""What a request costs at most is never less than what the tokenizer makes of it, whatever it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from models import DEMO, Item, Job, JobTooLong, ModelCard, Pixels
from models.images import ImagePreparer
from models.prompt import Prompt
from models.weights import DEMO_DIRECTORY
from service.asks import Ask, RawItem
from service.costs import most_tokens, text_tokens
from tests.tiny_qwen import make_tokenizer
from tests.unit.test_patches import make_preparer
from tests.unit.test_prompt import texts

sides = st.tuples(st.none() | texts, st.none() | st.tuples(st.integers(1, 60), st.integers(1, 60))).filter(
    lambda side: side != (None, None)
)


@pytest.fixture(scope="module")
def prompts() -> tuple[Prompt, ...]:
    return Prompt.load(DEMO_DIRECTORY), Prompt(make_tokenizer().to_str())


@pytest.fixture(scope="module")
def preparer(tmp_path_factory: pytest.TempPathFactory) -> ImagePreparer:
    return make_preparer(tmp_path_factory.mktemp("preparer"), {"max_pixels": 12_544, "min_pixels": 3_136})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    query=sides,
    documents=st.lists(sides, min_size=1, max_size=4),
    instruction=st.none() | texts.filter(bool),
    context=st.sampled_from([150, 400, 100_000]),
    most=st.none() | st.integers(1, 30),
)
@example(
    ("\u0958\u2adc\u1d15e", None), [("\ufb2c" * 40, None)], "\u0958", 100_000, None
)  # NFC makes these longer
@example((">\u0338", (60, 1)), [("\u0338", (1, 60)), (")" * 9, None)], None, 100_000, None)
def test_a_bound_holds_for_any_text_and_image(
    prompts: tuple[Prompt, ...],
    preparer: ImagePreparer,
    query: tuple[str | None, tuple[int, int] | None],
    documents: list[tuple[str | None, tuple[int, int] | None]],
    instruction: str | None,
    context: int,
    most: int | None,
) -> None:
    def pixels(size: tuple[int, int]) -> Pixels:
        width, height = size
        return Pixels(width, height, bytes(width * height * 3))

    items = [Item(text, None if size is None else pixels(size)) for text, size in (query, *documents)]
    raw = [
        RawItem(f"{place}", text, b"" if size is not None else None)
        for place, (text, size) in enumerate((query, *documents))
    ]
    ask = Ask(raw[0], tuple(raw[1:]), instruction, 1, False, most, True)
    job = Job(items[0], tuple(items[1:]), instruction, most)
    images = {item.image: preparer.grid(item.image, 0) for item in items if item.image is not None}
    for prompt in prompts:
        card = ModelCard(
            "", "", 0, "", "", "", context, preparer.most_tokens, template_tokens=prompt.template_tokens
        )
        try:
            sheet = prompt.write(job, images, context_tokens=context)
        except JobTooLong:
            continue  # nothing is read, nothing is charged
        read = sum(len(sheet.prefix) + len(candidate) for candidate in sheet.candidates)
        assert read <= most_tokens(ask, card)
        assert read <= most_tokens(ask, None)


@settings(deadline=None)
@given(
    width=st.integers(1, 5_000),
    height=st.integers(1, 5_000),
    largest=st.sampled_from([None, 784, 12_544, 10**7]),
)
@example(5_000, 25, 12_544)
@example(25, 5_000, None)
def test_no_image_is_more_tokens_than_the_card_says(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, largest: int | None
) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    preparer = _preparer(tmp_path_factory, largest)
    blank = Pixels.__new__(Pixels)  # a size is all that is looked at: no need for its bytes
    object.__setattr__(blank, "width", width)
    object.__setattr__(blank, "height", height)
    assert (
        preparer.grid(blank, 0).tokens
        <= preparer.most_tokens
        <= ModelCard("", "", 0, "", "", "", 0).image_tokens
    )


_made: dict[int | None, ImagePreparer] = {}


def _preparer(factory: pytest.TempPathFactory, largest: int | None) -> ImagePreparer:
    if largest not in _made:
        _made[largest] = make_preparer(factory.mktemp("image"), {"max_pixels": largest} if largest else {})
    return _made[largest]


def test_each_document_reads_the_query_again() -> None:
    card = ModelCard("", "", 0, "", "", "", 10_000, 50, 100)
    one = Ask(RawItem("query", "four", b""), (RawItem("documents[0]", "sixsix"),), None, 1, False, None, True)
    assert most_tokens(one, card) == 100 + 4 + 50 + 6
    three = Ask(one.query, one.documents * 3, "inst", 1, False, None, True)
    assert most_tokens(three, card) == 3 * (100 + 4 + 4 + 50 + 6)
    assert most_tokens(Ask(one.query, one.documents * 3, None, 1, False, 2, True), card) == 3 * (
        100 + 4 + 50 + 2
    )


def test_a_pair_is_never_more_than_the_context() -> None:
    card = ModelCard("", "", 0, "", "", "", 500, 50, 100)
    ask = Ask(RawItem("query", "q"), (RawItem("documents[0]", "x" * 10_000),) * 2, None, 1, False, None, True)
    assert most_tokens(ask, card) == 1_000
    assert most_tokens(ask, None) > 20_000


@pytest.mark.parametrize(
    ("text", "tokens"), [(None, 0), ("", 0), ("abc", 3), ("中文", 6), ("\u0958", 6), ("\ud800", 3)]
)
def test_a_text_is_at_most_its_bytes(text: str | None, tokens: int) -> None:
    assert text_tokens(text) == tokens


def test_the_demo_models_card_says_its_bounds() -> None:
    declared = json.loads((Path(DEMO_DIRECTORY) / "preprocessor_config.json").read_text())
    assert declared, DEMO
    prompt = Prompt.load(DEMO_DIRECTORY)
    assert prompt.template_tokens < 200
