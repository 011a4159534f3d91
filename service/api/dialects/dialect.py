"""What a dialect is: two functions from bytes to an ask and from a ranking to an answer, and one for what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pydantic import BaseModel

    from service.asks import Ask, Exchange
    from service.errors import Trouble
    from service.rerank import Ranking


class Read(Protocol):
    """Parse and check a body against the tenant's limits (characters, documents, images, remote hosts).

    Returns the ask and the model it names. Raises `BadRequest`.
    """

    def __call__(
        self,
        body: bytes,
        *,
        text_length: int,
        documents_limit: int,
        images_limit: int,
        remote_hosts: tuple[str, ...] = (),
    ) -> tuple[Ask, str | None]: ...


@dataclass(frozen=True, slots=True)
class Complaint:
    """An error as a dialect's clients expect it."""

    status: int
    body: dict[str, Any]
    media_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to ask and be answered. Headers are the same in all of them."""

    name: str
    paths: tuple[str, ...]
    operation: str
    """What the log calls a request: `rerank` or `score`."""
    read: Read
    answer: Callable[[Exchange, Ask, Ranking, str], dict[str, Any]]
    """The 200's body; the string is the served model's name."""
    complain: Callable[[Trouble, Exchange], Complaint]
    request: type[BaseModel]
    """The body's shape, for the API's description; `read` is what checks it."""
    answered: type[BaseModel]
    refused: type[BaseModel]
    about: str
    """What a reader of the API's description is told, in a sentence or two."""
    examples: dict[str, dict[str, Any]]
    """Bodies by what they show."""


def repeated(words: str, characters: int = 80) -> str:
    """A caller's own words, cut to what is repeated to it."""
    return words if len(words) <= characters else f"{words[:characters]}…"


def lowered(sentence: str) -> str:
    """A sentence that goes on after a colon."""
    return sentence[:1].lower() + sentence[1:]
