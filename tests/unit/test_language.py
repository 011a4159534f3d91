"""A pack's margins are the stock model's own, one candidate at a time, however candidates and jobs are packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import ModelFailed
from models.attention import Form
from models.language import Language
from models.memory import PrefixMemory
from models.packing import Grid, Pack, Placed, Segment, Share, pack, place
from models.stock import Qwen2_5_VLForConditionalGeneration
from tests.tiny_qwen import make_config, make_tokenizer

VOCABULARY, YES, NO = 400, 301, 77
TOLERANCE = 1e-4  # |Δ(z_yes - z_no)| in fp32


def make_model(**text: Any) -> Qwen2_5_VLForConditionalGeneration:
    config: Any = make_config(make_tokenizer(), layers=3)
    for name, value in text.items():
        assert hasattr(config.text_config, name)
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # a new model has zeros and ones there
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    whole: Qwen2_5_VLForConditionalGeneration = model.eval().requires_grad_(False)
    return whole


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MODEL = make_model()
HIDDEN = 64


@dataclass
class Work:
    """A job: what its parts are made of, the features of its images, and its prefix's memory."""

    prefix: Segment
    segments: list[Segment]
    features: dict[int, Tensor]
    memory: PrefixMemory = field(default_factory=PrefixMemory)

    def share(self, candidates: Sequence[int], *, holds_prefix: bool) -> Share:
        return Share(self.prefix, self.segments, tuple(candidates), holds_prefix)


def make_work(seed: int, prefix: int, lengths: Sequence[int], *, images: bool = False) -> Work:
    generator = torch.Generator().manual_seed(seed)
    features: dict[int, Tensor] = {}

    def segment(tokens: int) -> Segment:
        ids = torch.randint(VOCABULARY, (tokens,), generator=generator).tolist()
        if not images or tokens < 8:
            return Segment(tuple(ids))
        grid = Grid(len(features), 2, 3)
        features[grid.image] = torch.randn(grid.tokens, HIDDEN, generator=generator)
        start = int(torch.randint(tokens - grid.tokens + 1, (), generator=generator))
        ids[start : start + grid.tokens] = [MODEL.config.image_token_id] * grid.tokens
        return Segment(tuple(ids), (Placed(start, grid),))

    return Work(segment(prefix), [segment(length) for length in lengths], features)


@torch.inference_mode()
def reference(work: Work, model: Qwen2_5_VLForConditionalGeneration = MODEL) -> list[float]:
    """The stock model's forward over each candidate alone, and its own logits."""
    margins, stock = [], model.model
    for segment in work.segments:
        ids = torch.tensor([[*work.prefix.ids, *segment.ids]])
        embedded = stock.get_input_embeddings()(ids)
        for shift, run in ((0, work.prefix), (len(work.prefix), segment)):
            for placed in run.images:
                start = shift + placed.start
                embedded[0, start : start + placed.grid.tokens] = work.features[placed.grid.image]
        first, end = place(work.prefix, 0)
        positions = torch.tensor([*map(list, [*first.T, *place(segment, end)[0].T])]).T  # [3, tokens]
        out = stock.language_model(inputs_embeds=embedded, position_ids=positions[:, None])
        logits = model.lm_head(out.last_hidden_state[0, -1])
        margins.append((logits[YES] - logits[NO]).item())
    return margins


def make_language(form: Form = "cascade", model: Qwen2_5_VLForConditionalGeneration = MODEL) -> Language:
    return Language(model, yes=YES, no=NO, form=form)


def read(
    language: Language, works: Sequence[Work], shares: Sequence[Share], *, remember: bool
) -> list[float]:
    each = pack(shares)
    features: list[Mapping[int, Tensor]] = [work.features for work in works]
    margins: list[float] = language.margins(
        each, features, [work.memory if remember else None for work in works]
    ).tolist()
    return margins


def assert_alike(margins: Sequence[float], wanted: Sequence[float]) -> None:
    assert len(margins) == len(wanted)
    assert max((abs(a - b) for a, b in zip(margins, wanted, strict=True)), default=0.0) <= TOLERANCE


@pytest.mark.parametrize("form", ["cascade", "dense"])
@pytest.mark.parametrize("images", [False, True])
def test_a_packs_margins_are_the_stock_models(form: Form, images: bool) -> None:
    language = make_language(form)
    works = [
        make_work(1, 20, [3, 17, 1, 150], images=images),
        make_work(2, 140, [30, 30], images=images),
        make_work(3, 9, [12], images=images),
    ]
    shares = [work.share(range(len(work.segments)), holds_prefix=True) for work in works]
    wanted = [margin for work in works for margin in reference(work)]
    assert max(wanted) - min(wanted) > 0.5
    assert_alike(read(language, works, shares, remember=False), wanted)


@pytest.mark.parametrize("form", ["cascade", "dense"])
def test_a_prefix_may_be_filled_first_and_recalled_by_parts_of_several_packs(form: Form) -> None:
    language = make_language(form)
    works = [make_work(4, 30, [5, 40, 11], images=True), make_work(5, 200, [9, 25], images=True)]
    first, second = works
    assert read(language, [first], [first.share([], holds_prefix=True)], remember=True) == []
    one, other = map(reference, works)
    margins = read(
        language,
        works,
        [first.share([2, 0], holds_prefix=False), second.share([1], holds_prefix=True)],
        remember=True,
    )
    assert_alike(margins, [one[2], one[0], other[1]])
    margins = read(
        language,
        works[::-1],
        [second.share([0], holds_prefix=False), first.share([1], holds_prefix=False)],
        remember=True,
    )
    assert_alike(margins, [other[0], one[1]])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_packs_of_any_jobs_score_as_each_candidate_alone(data: st.DataObject) -> None:
    language = make_language()
    lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)
    works = [
        make_work(
            data.draw(st.integers(0, 99)), data.draw(st.integers(1, 150)), data.draw(lengths), images=True
        )
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    left = [list(range(len(work.segments))) for work in works]
    held = [False for _ in works]
    margins = [[0.0] * len(work.segments) for work in works]
    while any(left):
        chosen = data.draw(
            st.lists(st.sampled_from([n for n, rest in enumerate(left) if rest]), min_size=1, unique=True)
        )
        shares, taken = [], []
        for number in chosen:
            count = data.draw(st.integers(0 if not held[number] else 1, len(left[number])))
            taken.append([left[number].pop() for _ in range(count)])
            shares.append(works[number].share(taken[-1], holds_prefix=not held[number]))
            held[number] = True
        values = iter(read(language, [works[number] for number in chosen], shares, remember=True))
        for number, candidates in zip(chosen, taken, strict=True):
            for candidate in candidates:
                margins[number][candidate] = next(values)
    for work, got in zip(works, margins, strict=True):
        assert_alike(got, reference(work))


def test_shapes_of_a_larger_model_score_alike() -> None:
    """Seven query heads to a key head and wider rows, as the 7B model has; and no tied head."""
    model = make_model(
        hidden_size=14 * 16, num_attention_heads=14, num_key_value_heads=2, intermediate_size=400
    )
    work = make_work(6, 40, [3, 30, 140])
    margins = read(
        make_language(model=model), [work], [work.share([0, 1, 2], holds_prefix=True)], remember=False
    )
    assert_alike(margins, reference(work, model))


def test_two_threads_at_once_score_as_one_after_the_other() -> None:
    language = make_language()
    works = [make_work(seed, 50, [5, 30, 60], images=True) for seed in range(8)]
    score = partial(read, language, remember=True)
    shares = [[work.share([0, 1, 2], holds_prefix=True)] for work in works]
    apart = [score([work], each) for work, each in zip(works, shares, strict=True)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            together = list(threads.map(score, [[work] for work in works], shares))
            assert together == apart


def test_bf16_stays_near_fp32() -> None:
    model = make_model().bfloat16()
    exact = make_model()
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    work = make_work(7, 60, [20, 50, 130], images=True)
    margins = read(
        make_language(model=model), [work], [work.share([0, 1, 2], holds_prefix=True)], remember=False
    )
    wanted = reference(work, exact)
    assert max(abs(a - b) for a, b in zip(margins, wanted, strict=True)) < 0.05 * (max(wanted) - min(wanted))


def test_weights_are_neither_copied_nor_changed() -> None:
    model = make_model()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    language = make_language(model=model)
    work = make_work(8, 20, [9])
    read(language, [work], [work.share([0], holds_prefix=True)], remember=False)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_what_is_no_qwen_and_packs_without_their_prefix_are_refused() -> None:
    with pytest.raises(ModelFailed, match="activation"):
        make_language(model=make_model(hidden_act="gelu"))
    language, work = make_language(), make_work(9, 10, [4])
    orphan: Pack = pack([work.share([0], holds_prefix=False)])
    with pytest.raises(RuntimeError, match="needs a memory"):
        language.margins(orphan, [{}], [None])
    with pytest.raises(RuntimeError, match="one memory"):
        language.margins(pack([work.share([0], holds_prefix=True)]), [{}], [])
    with pytest.raises(KeyError):
        language.margins(orphan, [{}], [PrefixMemory()])
