"""Qwen2.5-VL as a reranker: the prompt, the vision tower and the language model behind one engine.

`score` and `begin` go through the engine. `score_dense` is the reference beside it: one candidate at a time, through
the stock model's own mask, positions and full-vocabulary logits.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models import (
    ANYONE,
    Done,
    Job,
    ModelCard,
    ModelFailed,
    Pixels,
    Scores,
    Trust,
    Work,
    attention,
    flex,
    loading,
    weights,
)
from models.cuda_memory import CudaError, CudaRuntime
from models.engine import Engine, Limits
from models.images import ImagePreparer, Patches
from models.language import Language
from models.lending import BorrowedWeights, NotShareable, open_gpu
from models.memory import PrefixMemory
from models.packing import Grid, Pack
from models.prompt import Prompt, Sheet
from models.sealing import SealedWeights
from models.stock import Qwen2_5_VLForConditionalGeneration
from models.tensors import DTYPES, native_dtype
from models.tower import Tower

# Tokens of one forward: every product is large enough by then. On a CPU more falls out of its caches.
CPU_PACK_TOKENS, GPU_PACK_TOKENS = 1024, 16_384


class Qwen:
    """What the engine computes with (`engine.Model`). Safe for several threads at once."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        prompt: Prompt,
        preparer: ImagePreparer,
        *,
        form: attention.Form,
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.preparer = preparer
        self.tower = Tower(model, preparer.colours)
        self.language = Language(model, yes=prompt.yes, no=prompt.no, form=form)
        text: Any = model.config.text_config
        self._context_tokens: int = text.max_position_embeddings

    def grid(self, pixels: Pixels, number: int) -> Grid:
        return self.preparer.grid(pixels, number)

    def write(self, job: Job, grids: Mapping[Pixels, Grid]) -> Sheet:
        return self.prompt.write(job, grids, context_tokens=self._context_tokens)

    def see(self, images: Sequence[Pixels]) -> list[Tensor]:
        return self.tower.see([self.preparer.prepare(image) for image in images])

    def read(
        self, packed: Pack, features: Sequence[Mapping[int, Tensor]], memories: Sequence[PrefixMemory | None]
    ) -> list[float]:
        margins: list[float] = self.language.margins(packed, features, memories).tolist()
        return margins


class QwenReranker:
    """A `models.Reranker` over any Qwen2.5-VL checkpoint."""

    def __init__(self, qwen: Qwen, card: ModelCard, limits: Limits) -> None:
        self.qwen = qwen
        self._card = card
        context = f"{card.digest} {card.dtype} {qwen.preparer.parameters}".encode()
        self._engine = Engine(qwen, context, limits)
        self._tickets = itertools.count(-1, -1)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        attention_form: attention.Form | None = None,
        pack_tokens: int | None = None,
        shared: int | None = None,
        offer: int | None = None,
        own_weights: bool = False,
        cuda: CudaRuntime | None = None,
        trust: Trust = ANYONE,
    ) -> QwenReranker:
        """Load `pericarp-demo`, a checkpoint directory or a hub name.

        `threads` (1) work on a CPU, each on a pack of its own; a GPU has one. `dtype` is "auto", "bf16" or "fp32".
        `attention_form` defaults to the cascade on a CPU and to flex on a GPU. `shared`, `offer`, `own_weights` and
        `trust` are as in `models.load`; `cuda` is how an offer is taken up, by default the runtime that torch has loaded. Sets
        torch's own threads to one, for the whole process. Raises `ModelNotFound`, or `ModelFailed` where the files
        do not make a whole model.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        on_cpu = device == "cpu"
        if dtype == "auto":
            dtype = native_dtype(torch.device(device))
        if dtype not in DTYPES:
            raise ValueError(f"no dtype {dtype!r}: auto, {', '.join(DTYPES)}")
        torch.set_num_threads(1)
        form = attention_form or ("cascade" if on_cpu else "flex")
        memory: SealedWeights | BorrowedWeights | None = None if shared is None else SealedWeights(shared)
        unlent: str | None = None
        if offer is not None:
            try:
                memory = BorrowedWeights(offer, cuda or open_gpu(device)[1])
            except (CudaError, NotShareable) as exc:
                unlent = str(exc)
        checkpoint = weights.find(name, known={} if memory is None else memory.hashes(), trust=trust)
        model = loading.load_model(
            checkpoint, torch.device(device), DTYPES[dtype], shared=memory, own=own_weights
        )
        text: Any = model.config.text_config
        vision: Any = model.config.vision_config
        prompt = Prompt(checkpoint.contents["tokenizer.json"])
        image_pad = prompt.controls["<|image_pad|>"]
        if prompt.vocabulary > text.vocab_size or model.config.image_token_id != image_pad:
            raise ModelFailed(f"the tokenizer of model {name!r} is not the one of its weights")
        preparer = ImagePreparer(
            checkpoint.json("preprocessor_config.json"),
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
        )
        card = ModelCard(
            name=name,
            digest=checkpoint.digest,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtype=dtype,
            device=device,
            attention=form,
            context_tokens=text.max_position_embeddings,
            image_tokens=preparer.most_tokens,
            template_tokens=prompt.template_tokens,
            weights=_holding(memory, on_cpu=on_cpu),
            unlent=unlent,
            manifest=checkpoint.manifest,
            revision=checkpoint.revision,
        )
        limits = Limits(
            threads=(threads or 1) if on_cpu else 1,
            pack_tokens=pack_tokens or (CPU_PACK_TOKENS if on_cpu else GPU_PACK_TOKENS),
        )
        if form == "flex" and not on_cpu:
            flex.warm_up(
                heads=text.num_attention_heads,
                key_heads=text.num_key_value_heads,
                size=text.hidden_size // text.num_attention_heads,
                dtype=DTYPES[dtype],
                device=torch.device(device),
                most_rows=2 * limits.pack_tokens,  # a pack, and prefixes that it recalls
            )
        return cls(Qwen(model, prompt, preparer, form=form), card, limits)

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def compilations(self) -> int:
        return flex.compilations()

    @property
    def work(self) -> Work:
        return self._engine.work

    def score(self, job: Job) -> Scores:
        answer: list[Scores | Exception] = []
        answered = threading.Event()

        def take(outcome: Scores | Exception) -> None:
            answer.append(outcome)
            answered.set()

        self.begin(next(self._tickets), job, take)
        answered.wait()
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

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
        self._engine.begin(ticket, job, done, tenant=tenant, session=session, deadline_s=deadline_s)

    def cancel(self, ticket: int) -> None:
        self._engine.cancel(ticket)

    def end_session(self, session: str, *, tenant: str = "") -> None:
        self._engine.end_session(session, tenant=tenant)

    def forget(self, tenant: str) -> None:
        self._engine.forget(tenant)

    def rest(self) -> None:
        self._engine.rest()

    @torch.inference_mode()
    def score_dense(self, job: Job) -> Scores:
        """The reference: the same prompts, each alone and whole through the stock model, and its full logits.

        For tests and benchmarks, with nothing else at work. Only the last step is ours: z_yes - z_no in fp32.
        """
        qwen = self.qwen
        images = list(
            dict.fromkeys(each.image for each in (job.query, *job.candidates) if each.image is not None)
        )
        patches = [qwen.preparer.prepare(image) for image in images]
        grids = {image: qwen.grid(image, number) for number, image in enumerate(images)}
        sheet = qwen.write(job, grids)
        margins, computed, visual = [], 0, 0
        for segment in sheet.candidates:
            ids = torch.tensor([[*sheet.prefix.ids, *segment.ids]], device=qwen.model.device)
            placed = [each.grid.image for each in (*sheet.prefix.images, *segment.images)]
            logits = qwen.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **self._stock_images(ids, [patches[number] for number in placed]),
            )
            answers = logits.logits[0, -1, [qwen.prompt.yes, qwen.prompt.no]].float()
            margins.append((answers[0] - answers[1]).item())
            computed += ids.shape[1]
            visual += sum(grids[images[number]].tokens for number in placed)
        return Scores(
            margins=tuple(margins),
            input_tokens=computed,
            image_tokens=visual,
            computed_tokens=computed,
            truncated=sheet.truncated,
        )

    def _stock_images(self, ids: Tensor, shown: list[Patches]) -> dict[str, Any]:
        """What the stock processor would add to the call; `mm_token_type_ids` is 1 at visual tokens."""
        if not shown:
            return {}
        return {
            "pixel_values": torch.cat([each.values for each in shown]).to(self.qwen.model.device),
            "image_grid_thw": torch.tensor(
                [each.patch_grid for each in shown], device=self.qwen.model.device
            ),
            "mm_token_type_ids": (ids == self.qwen.model.config.image_token_id).int(),
        }


def _holding(memory: SealedWeights | BorrowedWeights | None, *, on_cpu: bool) -> str:
    """As `ModelCard.weights` says it; on a GPU the sealed memory is empty."""
    if isinstance(memory, BorrowedWeights):
        return "lent"
    return "sealed" if memory is not None and on_cpu else "own"
