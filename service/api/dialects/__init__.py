"""Dialects: the paths of Cohere's, Jina's, Voyage's and vLLM's clients, each in its own words, errors included.

    dialect.py   what a dialect is: read, answer, complain
    union.py     the bare `/v1/rerank`
    cohere.py · jina.py · voyage.py · vllm.py

A dialect is chosen by the path alone, so that its clients understand also what is answered before there is a route:
a missing key, a body that is too large, a path that does not exist.
"""

from __future__ import annotations

from service.api.dialects.cohere import COHERE_V1, COHERE_V2
from service.api.dialects.dialect import Dialect
from service.api.dialects.jina import JINA
from service.api.dialects.union import UNION
from service.api.dialects.vllm import VLLM_RERANK, VLLM_SCORE
from service.api.dialects.voyage import VOYAGE

__all__ = ["DIALECTS", "Dialect", "dialect_of"]

DIALECTS: tuple[Dialect, ...] = (UNION, COHERE_V1, COHERE_V2, JINA, VOYAGE, VLLM_RERANK, VLLM_SCORE)

_BY_PREFIX = {"cohere": COHERE_V2, "v2": COHERE_V2, "jina": JINA, "voyage": VOYAGE, "vllm": VLLM_RERANK}
_BY_PATH = {path: dialect for dialect in DIALECTS for path in dialect.paths}


def dialect_of(path: str) -> Dialect:
    """Who calls there, also where there is nothing: by the whole path, else by its first segment."""
    first = path.removeprefix("/").partition("/")[0]
    return _BY_PATH.get(path) or _BY_PREFIX.get(first, UNION)
