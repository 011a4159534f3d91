"""What the bench hands its peers is our prompt, byte for byte: else it would compare different work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from bench.peers import in_parts, kendall_tau
from bench.vllm_peer import TEMPLATE
from models import Item, Job, Pixels
from models.packing import Grid
from models.prompt import Prompt
from models.weights import DEMO_DIRECTORY
from service.api import items, schemas

IMAGE = Pixels(1, 1, b"rgb")
GRID = Grid(0, 2, 3)
BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"


def rendered_ids(query: Any, document: Any, **more: Any) -> list[int]:
    """The ids that a peer gets: the template as transformers renders it, encoded in one go."""
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    rendered: Any = render_jinja_template([messages], chat_template=TEMPLATE.read_text(), **more)[0]
    text = rendered[0].replace("<|image_pad|>", "<|image_pad|>" * GRID.tokens)
    ids: list[int] = Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json")).encode(text).ids
    return ids


def our_ids(query: Item, document: Item, instruction: str | None = None) -> list[int]:
    job = Job(query, (document,), instruction=instruction)
    sheet = Prompt.load(DEMO_DIRECTORY).write(job, {IMAGE: GRID}, context_tokens=10_000)
    return [*sheet.prefix.ids, *sheet.candidates[0].ids]


@pytest.mark.parametrize("text", ["a red shoe", ") odd\n\n start", "  红色的鞋, 42€ ", ""])
def test_text_is_rendered_as_our_prompt_as_a_string_and_as_a_part(text: str) -> None:
    expected = our_ids(Item("shoes\n"), Item(text))
    assert rendered_ids("shoes\n", text) == expected
    assert rendered_ids([{"type": "text", "text": "shoes\n"}], [{"type": "text", "text": text}]) == expected


def test_images_stand_before_the_text_of_their_side_in_whatever_order_the_parts_come() -> None:
    parts = [{"type": "text", "text": "new"}, {"type": "image", "image": "…"}]
    assert rendered_ids("shoes", parts) == our_ids(Item("shoes"), Item("new", IMAGE))
    assert rendered_ids("shoes", BLOCK) == our_ids(Item("shoes"), Item(None, IMAGE))  # as vLLM does it
    assert rendered_ids(parts, "old") == our_ids(Item("new", IMAGE), Item("old"))


def test_an_instruction_takes_the_place_of_the_default() -> None:
    assert rendered_ids("a", "b", instruction="Find it.") == our_ids(Item("a"), Item("b"), "Find it.")


def test_the_peers_form_of_a_request_is_one_that_we_read() -> None:
    body = in_parts(json.dumps({"query": "a", "documents": ["b", {"image": "aGk="}]}).encode())
    request = schemas.RerankRequest.model_validate_json(body)
    assert request.documents[0] == "b"
    assert isinstance(request.documents[1], items.Content)


def test_kendall_tau_is_one_for_the_same_order_and_less_for_each_swap() -> None:
    assert kendall_tau((0.1, 0.2, 0.3), (1.0, 2.0, 5.0)) == pytest.approx(1)
    assert kendall_tau((0.1, 0.2, 0.3), (3.0, 2.0, 1.0)) == pytest.approx(-1)
    assert kendall_tau((0.1, 0.2, 0.3), (2.0, 1.0, 3.0)) == pytest.approx(1 / 3)
    assert kendall_tau((1.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0)) == pytest.approx(5 / (5 * 6) ** 0.5)
