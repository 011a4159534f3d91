"""Qwen2.5-VL as a reranker, on stock transformers modules: images once, packs, a yes-no head in fp32.

`score` reads in time order: prepare images, write the prompt, see, pack, forward, read the head.
`score_dense` is the reference beside it: one candidate at a time, through the stock model's own mask,
positions and full-vocabulary logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import Job, ModelCard, ModelFailed, ModelNotFound, Pixels, Scores, attention, weights
from models.images import ImagePreparer, Patches
from models.packing import Pack, pack
from models.prompt import Prompt, Sheet
from models.stock import (
    AttentionInterface,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    transformers_logging,
)

# Tokens of one forward: every product is large enough by then. On a CPU more falls out of its caches.
CPU_PACK_TOKENS, GPU_PACK_TOKENS = 1024, 4096
# Patches of one call of the vision tower: 12 images at the reference's limit, or hundreds of small ones.
VISION_PATCHES = 65_536

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class _Work:
    """A job made ready: distinct candidates as segments, images, each candidate's place."""

    sheet: Sheet
    images: dict[Pixels, Patches]
    places: tuple[int, ...]  # [candidates] -> distinct candidate


class QwenReranker:
    """A `models.Reranker` over any Qwen2.5-VL checkpoint. Not safe for use from several threads at once."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        prompt: Prompt,
        preparer: ImagePreparer,
        card: ModelCard,
        *,
        pack_tokens: int = CPU_PACK_TOKENS,
    ) -> None:
        """`model`'s language model attends by `attention.NAME`, in the form that `card.attention` says."""
        self._model = model
        self._prompt = prompt
        self._preparer = preparer
        self._card = card
        self._pack_tokens = pack_tokens
        self._device = model.device
        rows = model.lm_head.weight[[prompt.yes, prompt.no]].detach().float()  # [2, hidden]
        self._head = rows[0] - rows[1]

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        attention_form: attention.Form | None = None,
    ) -> QwenReranker:
        """Load `pericarp-demo`, a checkpoint directory or a hub name.

        `threads` sets torch's for the whole process. `dtype` is "auto", "bf16" or "fp32". `attention_form`
        defaults to the cascade on a CPU and to dense elsewhere. Raises `ModelNotFound`, or `ModelFailed` where
        the files do not make a whole model.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "fp32" if device == "cpu" else "bf16"
        if dtype not in _DTYPES:
            raise ValueError(f"no dtype {dtype!r}: auto, {', '.join(_DTYPES)}")
        form = attention_form or ("cascade" if device == "cpu" else "dense")
        checkpoint = weights.find(name)
        model = _load_model(checkpoint, torch.device(device), _DTYPES[dtype])
        text, vision = _parts(model)
        card = ModelCard(
            name=name,
            digest=checkpoint.digest,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtype=dtype,
            device=device,
            attention=form,
            context_tokens=text.max_position_embeddings,
        )
        preparer = ImagePreparer(
            checkpoint.directory,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
        )
        prompt = Prompt.load(checkpoint.directory)
        image_pad = prompt.controls["<|image_pad|>"]
        if prompt.vocabulary > text.vocab_size or model.config.image_token_id != image_pad:
            raise ModelFailed(f"the tokenizer of model {name!r} is not the one of its weights")
        pack_tokens = CPU_PACK_TOKENS if device == "cpu" else GPU_PACK_TOKENS
        return cls(model, prompt, preparer, card, pack_tokens=pack_tokens)

    @property
    def card(self) -> ModelCard:
        return self._card

    @torch.inference_mode()
    def score(self, job: Job) -> Scores:
        """Score every candidate of `job`; equal candidates are computed once and score alike.

        Raises `JobTooLong` before anything is computed, `ModelFailed` where a score is not finite.
        """
        clock = _Clock()
        work = self._prepare(job, clock)
        clock.start("vision")
        features = self._see(work.images.values())
        clock.start("forward")
        packs = pack(work.sheet.prefix, work.sheet.candidates, budget_tokens=self._pack_tokens)
        memory = attention.PrefixMemory() if len(packs) > 1 else None
        margins = [0.0] * len(work.sheet.candidates)
        for each in packs:
            for index, margin in zip(
                each.candidates, self._forward(each, features, memory).tolist(), strict=True
            ):
                margins[index] = margin
        return self._scores(job, work, margins, sum(len(each.ids) for each in packs), clock)

    @torch.inference_mode()
    def score_dense(self, job: Job) -> Scores:
        """The reference: the same prompts, each alone and whole through the stock model, and its full logits.

        For tests and benchmarks. Only the last step is ours: z_yes - z_no in fp32.
        """
        clock = _Clock()
        work = self._prepare(job, clock)
        clock.start("forward")
        margins, computed = [], 0
        patches = {each.grid.image: each for each in work.images.values()}
        with self._stock_attention():
            for segment in work.sheet.candidates:
                ids = torch.tensor([[*work.sheet.prefix.ids, *segment.ids]], device=self._device)
                shown = [
                    patches[placed.grid.image] for placed in (*work.sheet.prefix.images, *segment.images)
                ]
                logits = self._model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **self._stock_images(ids, shown)
                )
                answers = logits.logits[0, -1, [self._prompt.yes, self._prompt.no]].float()
                margins.append((answers[0] - answers[1]).item())
                computed += ids.shape[1]
        return self._scores(job, work, margins, computed, clock)

    def _prepare(self, job: Job, clock: _Clock) -> _Work:
        clock.start("vision")
        distinct = {item: place for place, item in enumerate(dict.fromkeys(job.candidates))}
        items = (job.query, *distinct)
        images = self._preparer.prepare(item.image for item in items if item.image is not None)
        clock.start("tokenize")
        sheet = self._prompt.write(
            Job(job.query, tuple(distinct), job.instruction, job.max_candidate_tokens),
            {pixels: patches.grid for pixels, patches in images.items()},
            context_tokens=self._card.context_tokens,
        )
        return _Work(sheet, images, tuple(distinct[item] for item in job.candidates))

    def _see(self, images: Iterable[Patches]) -> list[Tensor]:
        """Visual tokens [tokens, hidden] of each image, by its number; in one call where memory allows."""
        features: list[Tensor] = []
        for batch in _batches(images):
            values = torch.cat([each.values for each in batch]).to(self._device)
            grids = torch.tensor([each.patch_grid for each in batch], device=self._device)
            features += self._model.get_image_features(values, grids).pooler_output
        return features

    def _forward(self, each: Pack, features: list[Tensor], memory: attention.PrefixMemory | None) -> Tensor:
        """Margins [candidates of the pack] in fp32.

        The stock language model's forward, layer by layer, but that in the last layer only the score rows attend
        and go further: nobody reads the others. The head is one vector, not a vocabulary.
        """
        language: Any = self._model.model.language_model
        hidden = language.embed_tokens(torch.from_numpy(each.ids).to(self._device))  # [tokens, hidden]
        for placed in each.images:
            hidden[placed.start : placed.start + placed.grid.tokens] = features[placed.grid.image].to(
                hidden.dtype
            )
        layout = attention.Layout.of(each, form=self._form, memory=memory, device=self._device)
        hidden = hidden.unsqueeze(0)  # [1, tokens, hidden]
        positions = torch.from_numpy(each.positions).unsqueeze(1).to(self._device)  # [3, 1, tokens]
        rotation = language.rotary_emb(hidden, positions)
        *layers, last = language.layers
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotation, layout=layout)
        attended, _ = last.self_attn(
            last.input_layernorm(hidden), position_embeddings=rotation, layout=layout, last_rows_only=True
        )
        rows = list(each.score_rows)
        hidden = hidden[:, rows] + attended[:, rows]  # [1, candidates, hidden]
        hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
        margins: Tensor = language.norm(hidden)[0].float() @ self._head
        return margins

    @property
    def _form(self) -> attention.Form:
        return "cascade" if self._card.attention == "cascade" else "dense"

    def _scores(
        self, job: Job, work: _Work, margins: list[float], computed_tokens: int, clock: _Clock
    ) -> Scores:
        """Fail closed: one margin that is not finite, and the job has no scores."""
        if not torch.tensor(margins).isfinite().all():
            raise ModelFailed("the model gave a score that is not a finite number")
        prefix, candidates, places = work.sheet.prefix, work.sheet.candidates, work.places
        prefix_images = sum(placed.grid.tokens for placed in prefix.images)
        cut = frozenset(work.sheet.truncated)
        return Scores(
            margins=tuple(margins[place] for place in places),
            input_tokens=sum(len(prefix) + len(candidates[place]) for place in places),
            image_tokens=sum(
                prefix_images + sum(placed.grid.tokens for placed in candidates[place].images)
                for place in places
            ),
            computed_tokens=computed_tokens,
            truncated=tuple(index for index, place in enumerate(places) if place in cut),
            stages_ms=clock.stop(),
        )

    @contextmanager
    def _stock_attention(self) -> Iterator[None]:
        config = self._model.model.language_model.config
        config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            config._attn_implementation = attention.NAME

    def _stock_images(self, ids: Tensor, shown: list[Patches]) -> dict[str, Any]:
        """What the stock processor would add to the call; `mm_token_type_ids` is 1 at visual tokens."""
        if not shown:
            return {}
        return {
            "pixel_values": torch.cat([each.values for each in shown]).to(self._device),
            "image_grid_thw": torch.tensor([each.patch_grid for each in shown], device=self._device),
            "mm_token_type_ids": (ids == self._model.config.image_token_id).int(),
        }


def _parts(model: Qwen2_5_VLForConditionalGeneration) -> tuple[Any, Any]:
    """The text and the vision configuration; their type is a union that only a loaded model narrows."""
    return model.config.text_config, model.config.vision_config


class _Clock:
    """Milliseconds by stage, monotonic; every stage is there, also one that took no time."""

    def __init__(self) -> None:
        self._ms = {"tokenize": 0.0, "vision": 0.0, "forward": 0.0}
        self._stage, self._since = "tokenize", time.perf_counter()

    def start(self, stage: str) -> None:
        now = time.perf_counter()
        self._ms[self._stage] += (now - self._since) * 1000
        self._stage, self._since = stage, now

    def stop(self) -> dict[str, float]:
        self.start(self._stage)
        return dict(self._ms)


def _load_model(
    checkpoint: weights.Checkpoint, device: torch.device, dtype: torch.dtype
) -> Qwen2_5_VLForConditionalGeneration:
    """The stock model with safetensors weights, in evaluation mode; a weight that is missing is an error."""
    AttentionInterface.register(attention.NAME, attention.attend)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config: Any = Qwen2_5_VLConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    except Exception as exc:  # transformers' strict dataclasses raise errors of their own
        raise ModelNotFound(
            f"the config.json of model {checkpoint.name!r} is not a Qwen2.5-VL configuration"
        ) from exc
    if "sliding_attention" in config.text_config.layer_types:
        raise ModelFailed(f"model {checkpoint.name!r} uses sliding windows, which packs do not know")
    try:
        model: Any
        loaded: dict[str, Any]
        model, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(  # type: ignore[misc]
            checkpoint.directory,
            config=config,
            dtype=dtype,
            attn_implementation={"": "sdpa", "text_config": attention.NAME, "vision_config": "sdpa"},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as exc:  # so do safetensors and torch
        raise ModelFailed(f"the weights of model {checkpoint.name!r} cannot be loaded") from exc
    # transformers fills a missing weight with random numbers and goes on; a reranker must not.
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        raise ModelFailed(f"the weights of model {checkpoint.name!r} are not whole")
    whole: Qwen2_5_VLForConditionalGeneration = model.to(device).eval().requires_grad_(False)
    return whole


def _batches(images: Iterable[Patches]) -> Iterator[list[Patches]]:
    """Images in order, at most `VISION_PATCHES` patches together."""
    batch: list[Patches] = []
    patches = 0
    for each in images:
        if batch and patches + len(each.values) > VISION_PATCHES:
            yield batch
            batch, patches = [], 0
        batch.append(each)
        patches += len(each.values)
    if batch:
        yield batch
