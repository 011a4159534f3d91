"""The prompt is the reference's, on the real Qwen vocabulary: ten requests, made apart from the code they test.

See `tests.assets.golden_prompts` for how the golden file is made, and for where it departs from the reference.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from models import Item, Job, Pixels
from models.packing import Grid, place
from models.prompt import INSTRUCTION, SYSTEM, Prompt, Sheet
from tests.assets import golden_prompts
from tests.assets.golden_prompts import CONTROLS, FILE, REQUESTS, Reference

GOLDEN: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
IMAGES = (Pixels(1, 1, b"rgb"), Pixels(1, 1, b"RGB"))  # the query's, the document's


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def prompt(reference: Reference) -> Prompt:
    return Prompt(reference.tokenizer.to_str())


def item(side: dict[str, Any], image: Pixels) -> Item:
    return Item(side["text"], image if side["image"] else None)


def write(prompt: Prompt, golden: dict[str, Any], *others: Item) -> Sheet:
    grids = {
        image: Grid(number, *golden[side]["image"])
        for number, (image, side) in enumerate(zip(IMAGES, ("query", "document"), strict=True))
        if golden[side]["image"]
    }
    query, document = item(golden["query"], IMAGES[0]), item(golden["document"], IMAGES[1])
    job = Job(query, (*others, document), golden["instruction"])
    return prompt.write(job, grids, context_tokens=10_000)


@pytest.mark.parametrize("golden", GOLDEN["requests"], ids=lambda golden: golden["name"])
def test_ids_and_positions_are_the_golden_ones(prompt: Prompt, golden: dict[str, Any]) -> None:
    sheet = write(prompt, golden, Item("another document"))
    prefix, document = sheet.prefix, sheet.candidates[-1]
    assert [*prefix.ids, *document.ids] == golden["ids"]
    before, end = place(prefix, 0)
    behind, _ = place(document, end)
    assert np.concatenate([before, behind], axis=1).tolist() == golden["positions"]
    placed = [*prefix.images, *document.images]
    assert [each.grid.tokens for each in placed] == golden["visual_tokens"]


@pytest.mark.parametrize("golden", GOLDEN["requests"], ids=lambda golden: golden["name"])
def test_golden_ids_read_back_as_the_prompt(reference: Reference, golden: dict[str, Any]) -> None:
    """One control token for each that the template wrote, and the text as it was, composed (NFC)."""
    text = reference.tokenizer.decode(golden["ids"], skip_special_tokens=False)
    head, *tails = golden["prompt"].split("<|image_pad|>")
    if not golden["reference_reads"]:
        pads = ["<|image_pad|>" * tokens for tokens in golden["visual_tokens"]]
        whole = head + "".join(pad + tail for pad, tail in zip(pads, tails, strict=True))
        assert text == reference.tokenizer.normalizer.normalize_str(whole)
    controls = [token for token in golden["ids"] if token >= CONTROLS["<|endoftext|>"]]
    images = sum(2 + tokens for tokens in golden["visual_tokens"])
    assert len(controls) == 5 + images
    assert golden["ids"].count(CONTROLS["<|im_end|>"]) == 2


def test_the_answers_are_qwens(prompt: Prompt) -> None:
    assert GOLDEN["answers"] == {"yes": 9693, "no": 2152}
    assert (prompt.yes, prompt.no) == (9693, 2152)
    assert prompt.controls == CONTROLS
    assert (CONTROLS["<|image_pad|>"], CONTROLS["<|file_sep|>"], prompt.vocabulary) == (
        151_655,
        151_664,
        151_665,
    )
    assert (golden_prompts.SYSTEM, golden_prompts.INSTRUCTION) == (SYSTEM, INSTRUCTION)


def test_every_pairing_is_golden() -> None:
    kinds = {
        tuple((bool(side["text"]), bool(side["image"])) for side in (golden["query"], golden["document"]))
        for golden in GOLDEN["requests"]
    }
    text, image, both = (True, False), (False, True), (True, True)
    assert kinds >= {
        *((text, text), (text, image), (image, text), (image, image)),
        *((text, both), (both, text), (both, both)),
    }
    assert any(golden["reference_reads"] for golden in GOLDEN["requests"])
    assert len(REQUESTS) == len(GOLDEN["requests"]) >= 10


def test_the_golden_file_is_what_its_script_makes_of_the_reference(reference: Reference) -> None:
    assert golden_prompts.write(golden_prompts.build(reference)) == FILE.read_text(encoding="utf-8")
