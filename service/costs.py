"""What a request costs at most, told without a tokenizer: an upper bound of the tokens that the model will read.

A tokenizer of Qwen's kind normalises a text to NFC and then never makes more tokens of it than it has bytes of UTF-8.
The model's card bounds the rest: the template, an image, and a whole pair, which the context cuts.
"""

from __future__ import annotations

import unicodedata
from itertools import cycle
from typing import TYPE_CHECKING

from models import ModelCard

if TYPE_CHECKING:
    from service.asks import Ask, RawItem

UNKNOWN = ModelCard("", "", 0, "", "", "", context_tokens=0)
"""The bounds of any model. Its context is not known, so nothing is cut by it."""


def most_tokens(ask: Ask, card: ModelCard | None) -> int:
    """Tokens of all pairs at most, as `usage.prompt_tokens` counts them: the whole prompt once per document."""
    bounds = card or UNKNOWN
    shared = bounds.template_tokens + text_tokens(ask.instruction)
    queries = cycle([_item_tokens(query, bounds) for query in ask.queries or (ask.query,)])
    total = 0
    for query_tokens, document in zip(queries, ask.documents, strict=False):
        tokens = shared + query_tokens + _item_tokens(document, bounds, ask.max_tokens_per_doc)
        total += min(tokens, bounds.context_tokens) if card is not None else tokens
    return total


def text_tokens(text: str | None) -> int:
    """Tokens of a text at most."""
    if text is None:
        return 0
    if text.isascii():
        return len(text)
    return len(unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass"))


def _item_tokens(item: RawItem, bounds: ModelCard, most: int | None = None) -> int:
    tokens = text_tokens(item.text)
    if most is not None:
        tokens = min(tokens, most)
    return tokens + (bounds.image_tokens if item.pictured else 0)
