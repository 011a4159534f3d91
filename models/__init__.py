"""Scoring: the contract between the service and any reranker. Free of torch: the gateway may import it.

A `Job` is one query with its candidates, already decoded and clean: text is `str`, an image is RGB pixels.
A `Reranker` turns a job into `Scores`, one per candidate, in the order of the candidates.

    models/prompt.py    the one prompt template; untrusted text is tokenised as text
    models/packing.py   prompt segments -> packed ids, positions, segments, score rows; integers only
    models/engine.py    several jobs at once on a few threads, the shortest first (models/run.py: one job's way)
    models/memory.py    what is kept: a prefix's keys and values, images' features, what sessions pin
    models/attention.py shared-prefix attention: cascade.py on a CPU, flex.py on a GPU, a dense reference beside them
    models/language.py  the language model over packs, with a yes-no head in fp32
    models/tower.py     the vision tower over many images at once
    models/images.py    pixels -> the vision tower's patches, by the reference's two resizes
    models/qwen.py      the reranker that is made of these
    models/weights.py   safetensors only: where a model's files are, what they are, their digest
    models/folder.py    what may lie in a model's folder, each byte checked as it is read; headers.py: strictly
    models/manifest.py  which files a model has and who signed that; sealed_memory.py: what nobody changes any more
    models/tensors.py   a checkpoint's tensors, mapped, and the dtype to compute in
    models/loading.py   weights mapped, not copied; sealing.py: one sealed copy for all workers of a host
    models/lending.py   one copy on a GPU, which its owner lends to workers; cuda_memory.py: the calls that takes
    models/stock.py     what is taken from transformers, imported in the order that works
    models/demo/        the embedded model and the code that trained it

`models` imports neither `service` nor `tenants`, and opens no database and no socket but for a hub name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from operator import add, sub
from typing import Protocol


class ModelError(Exception):
    """The model could not be used."""


class ModelNotFound(ModelError):
    """No model directory or hub name like that can be loaded."""


class ModelFailed(ModelError):
    """The model gave no usable score."""


class ModelRefused(ModelError):
    """The model's files are not those that may be served: unsigned, changed, or not safe to read."""


class JobTooLong(ModelError):
    """The query, alone or with one candidate's image, does not fit into the model's context."""


class CandidateTooLong(JobTooLong):
    """A candidate's text does not fit, and may not be cut."""

    def __init__(self, item: Item, limit_tokens: int) -> None:
        """`item` is one of the job's candidates; `limit_tokens` of its text would have fitted."""
        super().__init__("a candidate's text does not fit, and may not be cut")
        self.item = item
        self.limit_tokens = limit_tokens


class JobExpired(ModelError):
    """The job's deadline passed before it was computed."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """One clean image: 8-bit RGB, row-major, top row first; `len(data) == height * width * 3`."""

    width: int
    height: int
    data: bytes

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1 or len(self.data) != self.width * self.height * 3:
            raise ValueError(
                f"{self.width}x{self.height} RGB pixels need {self.width * self.height * 3} bytes"
            )


@dataclass(frozen=True, slots=True)
class Item:
    """One side of a pair: text, an image, or both (the image comes first in the prompt)."""

    text: str | None = None
    image: Pixels | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.image is None:
            raise ValueError("an item needs a text, an image, or both")


@dataclass(frozen=True, slots=True)
class Job:
    """One query and its candidates. `instruction=None` means the prompt's default instruction.

    A candidate's text loses its tail after `max_candidate_tokens`, or where the model's context ends; with
    `truncate=False` such a job fails instead, with `CandidateTooLong`.
    """

    query: Item
    candidates: tuple[Item, ...]
    instruction: str | None = None
    max_candidate_tokens: int | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Scores:
    """One number per candidate, in the order of `Job.candidates`.

    `margins[i]` is z_yes - z_no at candidate i's last position, in fp32; the relevance score is its sigmoid
    (facts: lychee-rerank-mm, section 1.3). `truncated` lists the candidates whose text was cut to fit.
    `input_tokens` and, within them, `image_tokens` are what the reference would have read: the whole prompt,
    once per candidate. `computed_tokens` is what ran: the prefix once, equal candidates once, nothing that a
    session had kept. `reused_images` counts distinct images whose features were at hand. `stages_ms` has
    "tokenize", "vision" (resizing included) and "forward": the time of the threads that did it, added up.
    """

    margins: tuple[float, ...]
    input_tokens: int
    image_tokens: int
    computed_tokens: int
    truncated: tuple[int, ...] = ()
    reused_images: int = 0
    stages_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """What a reranker has done so far. Every number only grows.

    Of its `packs` (forward passes): the tokens in them and those that there was room for. Of the jobs that it
    finished: distinct images whose features were at hand or had to be seen; and, of jobs that name a session, prefixes and
    candidates that the session had kept or that had to be read.
    """

    packs: int = 0
    packed_tokens: int = 0
    room_tokens: int = 0
    images_kept: int = 0
    images_seen: int = 0
    prefixes_kept: int = 0
    prefixes_read: int = 0
    candidates_kept: int = 0
    candidates_read: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: Work) -> Work:
        return Work(*map(sub, astuple(self), astuple(other)))

    def __or__(self, other: Work) -> Work:
        """The later of two states of one reranker."""
        return Work(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a loaded model says of itself.

    `weights` says whose they are: its process's `own`, or shared with others: a `sealed` copy in memory, or one
    `lent` by its owner on the GPU. `unlent` says why weights that were offered could not be borrowed.
    """

    name: str
    digest: str
    parameters: int
    dtype: str
    device: str
    attention: str
    context_tokens: int
    image_tokens: int = 16_384
    """Visual tokens of one image at most. The default is more than any Qwen2.5-VL makes of one."""
    template_tokens: int = 1_024
    """Tokens of a prompt besides those of its texts and images, the default instruction included, at most."""
    weights: str = "own"
    unlent: str | None = None
    manifest: str = ""
    """The root digest of the manifest that was signed, SHA-256 in hex; none where no signature was asked for."""
    revision: str = ""
    """As the manifest says, or the hub's commit; may be unknown."""


Done = Callable[[Scores | Exception], None]
"""Takes a job's scores, or why there are none: a `ModelError`, or whatever went wrong in unforeseen ways."""


class Reranker(Protocol):
    """Scores jobs, several at a time on threads of its own. Every method may be called from any thread."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def compilations(self) -> int:
        """How often kernels were compiled for a shape so far; it stays where it is once warm. 0 on a CPU."""
        ...

    @property
    def work(self) -> Work: ...

    def score(self, job: Job) -> Scores:
        """Score every candidate of `job`, and wait for it.

        Raises `JobTooLong` where the prefix, alone or with one candidate's image, exceeds the context, and
        `ModelFailed` where a score is not finite; then there are no scores at all.
        """
        ...

    def begin(
        self,
        ticket: int,
        job: Job,
        done: Done,
        *,
        tenant: str = "",
        session: str | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """Score `job` beside others; `done` is called once, from another thread, unless it is cancelled.

        `ticket` is the caller's number for it. `deadline_s` is on the clock of `time.monotonic`: a job that is
        not finished then fails with `JobExpired`, and what is left of it is not computed. What the job computes
        is kept under `session`, and what was kept there is used, until `end_session`. What is kept of one `tenant`'s
        work, in a session or not, is never found by another's.
        """
        ...

    def cancel(self, ticket: int) -> None:
        """Drop what is left of a job; `done` is not called any more. Nothing happens where it has ended."""
        ...

    def end_session(self, session: str, *, tenant: str = "") -> None:
        """Overwrite and free all that was kept under `session`, at once or when its running jobs have ended."""
        ...

    def forget(self, tenant: str) -> None:
        """Overwrite and free all that was kept of the tenant's work, at once or when its running jobs have ended."""
        ...

    def rest(self) -> None:
        """End its threads, which start again with the next job. Call it where no job is left."""
        ...


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose models are loaded, and how sealed ones are opened. A sealed model needs both keys."""

    signer: bytes = b""
    """Public key, PEM or DER; none: models need no signature."""
    signature: str = ""
    """Where the signed manifest is; none: `model.sig` in the model's folder."""
    seal_key: bytes = field(default=b"", repr=False)
    """32 bytes; none: no model is opened that is sealed."""


ANYONE = Trust()
"""Any model that is safe to read."""
DEMO = "pericarp-demo"
"""The embedded model's name; any other name is a checkpoint directory or a hub name."""


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    shared: int | None = None,
    offer: int | None = None,
    own_weights: bool = False,
    trust: Trust = ANYONE,
) -> Reranker:
    """Load a Qwen2.5-VL checkpoint: `pericarp-demo`, a directory, or a hub name.

    `dtype="auto"` is bf16 on a GPU and on a CPU that need not emulate it, else fp32. `shared` is the descriptor of a
    memory that holds one copy of the weights for several processes on a CPU (`models.sealing`), `offer` of one that
    tells of a copy on a GPU (`models.lending`); a worker that cannot borrow it has a copy of its own, and its card says
    why. With `own_weights` they are copied into this process's own memory. `trust` says who must have signed it. Raises
    `ModelNotFound`, `ModelRefused` or `ModelFailed`.
    """
    from models.qwen import QwenReranker  # torch is imported here and nowhere above

    return QwenReranker.load(
        name,
        device=device,
        dtype=dtype,
        threads=threads,
        shared=shared,
        offer=offer,
        own_weights=own_weights,
        trust=trust,
    )
