"""The prompt template of lychee-rerank-mm, byte for byte, and the only way from untrusted text to token ids.

    <|im_start|>system\\n{SYSTEM}<|im_end|>\\n
    <|im_start|>user\\n<Instruct>: {instruction}<Query>:{image}{query}\\n<Document

    >:{image}{candidate}<|im_end|>\\n<|im_start|>assistant\\n

The first block is the prefix that all candidates share, the second is one candidate. Lines are broken here to
be read; nothing stands between the parts but what is written, and an image is
`<|vision_start|><|image_pad|>…<|vision_end|>`, one pad per visual token.

**User text is text.** It is encoded by a copy of the tokenizer that has no added tokens, so that `<|im_end|>`
in a document becomes the tokens of its ten characters. Control ids come from the template alone; each
segment is checked afterwards to hold exactly the control ids that the template put there, in that order.

**Exactness.** The reference encodes the rendered string, where merges run across the seam between template
and user text: `>:` followed by `)` may become one token. So each span between control tokens is encoded in
one go, with the user text in it. The prefix may be cut off only where a pre-token always ends. That is so
inside `<Document>:`, between the letters and `>`, whatever surrounds it; it is not so behind it, for a
document that begins with punctuation or a line break joins `>:`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from models import CandidateTooLong, Item, Job, JobTooLong, ModelFailed, Pixels
from models.packing import Grid, Placed, Segment

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

# The cut between prefix and candidate; see "Exactness" above.
PREFIX_END = "\n<Document"
CANDIDATE_START = ">:"

# Texts that might join `>:` or `<Document` under another pre-tokenizer than Qwen's; tried once, at load.
_SEAM_PROBES = ("a", " a", "\n", "\n\nA", ")", "):\n", "'s", "1", "中", "\u0301", " ", "\0", ">>=")


@dataclass(frozen=True, slots=True)
class Sheet:
    """One job as segments: the shared prefix, a segment per candidate, and whose text was cut."""

    prefix: Segment
    candidates: tuple[Segment, ...]
    truncated: tuple[int, ...]


class Prompt:
    """The template over one checkpoint's tokenizer.

    `yes` and `no` are the ids of the two answers; `controls` maps every added token to its id; every id is below
    `vocabulary`.
    """

    def __init__(self, tokenizer_json: str | bytes) -> None:
        """Raises `ModelFailed` where the tokenizer is not one of Qwen's kind."""
        try:
            state: dict[str, Any] = json.loads(tokenizer_json)
            self.controls: dict[str, int] = {token["content"]: token["id"] for token in state["added_tokens"]}
            # Neither limit belongs to the prompt: both would change ids behind our back.
            plain = state | {"added_tokens": [], "truncation": None, "padding": None}
            self._plain = Tokenizer.from_str(json.dumps(plain))
            self._im_start, self._im_end, self._vision_start, self._vision_end, self._image_pad = (
                self.controls[f"<|{name}|>"]
                for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad")
            )
        except Exception as exc:  # tokenizers raises it bare
            raise ModelFailed("the checkpoint's tokenizer.json is not a Qwen tokenizer") from exc
        self._control_ids = frozenset(self.controls.values())
        self.vocabulary = 1 + max(*self._control_ids, *self._plain.get_vocab().values())
        self._check_seam()
        self.yes, self.no = self._answer("yes"), self._answer("no")
        newline = self._encode("\n")
        self._opening = (
            self._im_start,
            *self._encode(f"system\n{SYSTEM}"),
            self._im_end,
            *newline,
            self._im_start,
        )
        self._closing = (self._im_end, *newline, self._im_start, *self._encode("assistant\n"))

    @classmethod
    def load(cls, directory: Path) -> Prompt:
        """Read `tokenizer.json` of a checkpoint directory."""
        return cls((directory / "tokenizer.json").read_bytes())

    @property
    def template_tokens(self) -> int:
        """Tokens of prefix and candidate besides those of texts and images at most, the default instruction included.

        Of what is encoded together with a text no more is known than that a token has a byte or more.
        """
        beside_text = f"user\n<Instruct>: {INSTRUCTION}<Query>:{PREFIX_END}{CANDIDATE_START}"
        image_blocks = 4
        return len(self._opening) + len(self._closing) + len(beside_text.encode()) + image_blocks

    def write(self, job: Job, grids: Mapping[Pixels, Grid], *, context_tokens: int) -> Sheet:
        """Write `job` into the template; `grids` says how many visual tokens each of its images is.

        A candidate's text loses tokens at its tail where it exceeds `job.max_candidate_tokens` or where
        prefix and candidate together exceed `context_tokens`; images and the closing turn are never cut.
        Raises `JobTooLong` where that leaves no room, `CandidateTooLong` for the first text that would be cut
        where `job.truncate` is off, `ModelFailed` where a control token came from anywhere but the template.
        """
        prefix = self._prefix(job.query, INSTRUCTION if job.instruction is None else job.instruction, grids)
        candidates, truncated = [], []
        for index, item in enumerate(job.candidates):
            segment, limit_tokens = self._candidate(
                item, grids, room_tokens=context_tokens - len(prefix), text_tokens=job.max_candidate_tokens
            )
            candidates.append(segment)
            if limit_tokens is not None:
                if not job.truncate:
                    raise CandidateTooLong(item, limit_tokens)
                truncated.append(index)
        return Sheet(prefix, tuple(candidates), tuple(truncated))

    def _prefix(self, query: Item, instruction: str, grids: Mapping[Pixels, Grid]) -> Segment:
        text = f"user\n<Instruct>: {instruction}<Query>:"
        tail = f"{query.text or ''}{PREFIX_END}"
        if query.image is None:
            return self._checked([*self._opening, *self._encode(text + tail)], None, self._opening)
        grid = grids[query.image]
        ids = [*self._opening, *self._encode(text)]
        start = self._add_image(ids, grid)
        ids += self._encode(tail)
        return self._checked(ids, Placed(start, grid), self._opening)

    def _candidate(
        self, item: Item, grids: Mapping[Pixels, Grid], *, room_tokens: int, text_tokens: int | None
    ) -> tuple[Segment, int | None]:
        """The candidate, and after how many tokens its text was cut, if it was."""
        ids: list[int] = []
        placed = None
        if item.image is not None:
            ids += self._encode(CANDIDATE_START)
            placed = Placed(self._add_image(ids, grids[item.image]), grids[item.image])
            text = self._encode(item.text or "")
        else:
            span = self._plain.encode(CANDIDATE_START + (item.text or ""), add_special_tokens=False)
            # A token that begins inside `>:` is the template's, even where it reaches into the text.
            head = sum(start < len(CANDIDATE_START) for start, _ in span.offsets[: len(CANDIDATE_START)])
            ids += span.ids[:head]
            text = span.ids[head:]
        room = room_tokens - len(ids) - len(self._closing)
        if room < 0:
            raise JobTooLong(
                "the query, or the query with one candidate's image, exceeds the model's context"
            )
        keep = min(len(text), room if text_tokens is None else min(room, text_tokens))
        ids += text[:keep]
        ids += self._closing
        return self._checked(ids, placed, self._closing), keep if keep < len(text) else None

    def _add_image(self, ids: list[int], grid: Grid) -> int:
        """Append an image block; its first visual token's place."""
        ids.append(self._vision_start)
        start = len(ids)
        ids += [self._image_pad] * grid.tokens
        ids.append(self._vision_end)
        return start

    def _checked(self, ids: list[int], placed: Placed | None, fixed: tuple[int, ...]) -> Segment:
        """Fail closed unless the control ids in `ids` are those of `fixed` and of one image block."""
        expected = [token for token in fixed if token in self._control_ids]
        if placed is not None:
            block = [self._vision_start, *[self._image_pad] * placed.grid.tokens, self._vision_end]
            expected = expected + block if fixed is self._opening else block + expected
        if [token for token in ids if token in self._control_ids] != expected:
            raise ModelFailed("a control token in the prompt did not come from the template")
        return Segment(tuple(ids), () if placed is None else (placed,))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _answer(self, word: str) -> int:
        """The id of an answer, lower case, no leading space; "Yes" would be another token, another score."""
        ids = self._encode(word)
        if len(ids) != 1 or ids[0] != self._plain.token_to_id(word):
            raise ModelFailed(f"the checkpoint's tokenizer has no single token {word!r}")
        return ids[0]

    def _check_seam(self) -> None:
        cut = self._encode(PREFIX_END)
        for probe in _SEAM_PROBES:
            whole = self._encode(PREFIX_END + CANDIDATE_START + probe)
            if whole != cut + self._encode(CANDIDATE_START + probe):
                raise ModelFailed("the checkpoint's tokenizer does not split words as Qwen's does")
