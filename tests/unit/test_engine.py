"""The engine answers every job once, with its own scores, the shortest first, and forgets what it should."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import Item, Job, JobExpired, JobTooLong, ModelFailed, Pixels, Scores, Work
from models import engine as engines
from models.engine import Engine, Limits
from models.memory import FeatureCache, Hasher, Pins, PrefixMemory
from models.packing import Grid, Pack, Placed, Segment
from models.prompt import Sheet

HIDDEN = 4


@dataclass
class Arithmetic:
    """A model that can be done in the head: a margin is a sum over the query's and the candidate's letters and pixels.

    Texts are a token a letter, an image is one row of as many tokens as it has columns. It looks into the memory as
    a real one would: a pack without its prefix needs what an earlier pack kept. `gate` holds every forward up.
    """

    packs: list[Pack] = field(default_factory=list)
    seen: list[list[Pixels]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def grid(self, pixels: Pixels, number: int) -> Grid:
        return Grid(number, 1, pixels.width)

    def write(self, job: Job, grids: Mapping[Pixels, Grid]) -> Sheet:
        if job.query.text == "too long":
            raise JobTooLong("too long")

        def segment(item: Item) -> Segment:
            ids = [ord(letter) for letter in item.text or ""]
            if item.image is None:
                return Segment((1, *ids))
            grid = grids[item.image]
            return Segment((*[0] * grid.tokens, 1, *ids), (Placed(0, grid),))

        return Sheet(segment(job.query), tuple(map(segment, job.candidates)), ())

    def see(self, images: Sequence[Pixels]) -> list[Tensor]:
        self.seen.append(list(images))
        return [torch.full((image.width, HIDDEN), float(image.data[0])) for image in images]

    def read(
        self, packed: Pack, features: Sequence[Mapping[int, Tensor]], memories: Sequence[PrefixMemory | None]
    ) -> list[float]:
        self.gate.wait(10)
        self.packs.append(packed)
        values = packed.ids.astype(float)
        margins = []
        for part, own, memory in zip(packed.parts, features, memories, strict=True):
            for placed in part.images:
                values[placed.start : placed.start + placed.grid.tokens] = own[placed.grid.image][:, 0]
            if part.holds_prefix:
                prefix = float(values[part.start : part.bounds[0]].sum())
                if memory is not None:
                    memory.keep(0, torch.tensor([prefix]), torch.tensor([prefix]))
            else:
                assert memory is not None
                prefix = float(memory.recall(0)[0])
            for start, end in zip(part.bounds, part.bounds[1:], strict=False):
                margins.append(1000 * prefix + float(values[start:end].sum()))
        return [float("nan") if margin == 1000 * 2 + 1 + ord("!") else margin for margin in margins]


def expected(job: Job) -> tuple[float, ...]:
    def value(item: Item) -> float:
        image = 0.0 if item.image is None else item.image.width * float(item.image.data[0])
        return image + 1 + sum(map(ord, item.text or ""))

    return tuple(1000 * value(job.query) + value(item) for item in job.candidates)


def picture(value: int, width: int = 3) -> Pixels:
    return Pixels(width, 1, bytes([value]) * (3 * width))


def texts(query: str, *candidates: str) -> Job:
    return Job(Item(query), tuple(map(Item, candidates)))


class Answers:
    """Collects outcomes by ticket, in the order in which they came."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Scores | Exception] = {}
        self._came = threading.Condition()

    def take(self, ticket: int) -> Callable[[Scores | Exception], None]:
        def done(outcome: Scores | Exception) -> None:
            with self._came:
                assert ticket not in self.outcomes, "told twice"
                self.outcomes[ticket] = outcome
                self._came.notify_all()

        return done

    def wait(self, count: int) -> dict[int, Scores | Exception]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.outcomes) >= count, 10), "an answer is missing"
        return self.outcomes

    def scores(self, ticket: int) -> Scores:
        with self._came:
            assert self._came.wait_for(lambda: ticket in self.outcomes, 10), "no answer"
        outcome = self.outcomes[ticket]
        assert isinstance(outcome, Scores), outcome
        return outcome


@pytest.fixture
def model() -> Arithmetic:
    model = Arithmetic()
    model.gate.set()
    return model


@pytest.fixture
def answers() -> Answers:
    return Answers()


def make(
    model: Arithmetic, *, threads: int = 1, pack_tokens: int = 100, cache_bytes: int = 1 << 20
) -> Engine:
    limits = Limits(threads=threads, pack_tokens=pack_tokens, cache_bytes=cache_bytes, session_bytes=1 << 20)
    return Engine(model, b"weights", limits)


def hold_up(engine: Engine, model: Arithmetic, answers: Answers) -> None:
    """Occupy the only thread with ticket 0 until the gate opens."""
    model.gate.clear()
    engine.begin(0, texts("hold", "up"), answers.take(0))
    time.sleep(0.05)


items = st.builds(
    Item,
    st.text("abc", max_size=30),
    st.none() | st.builds(picture, st.integers(1, 9), st.integers(1, 12)),
)
jobs = st.builds(Job, items, st.lists(items, max_size=12).map(tuple))


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.tuples(jobs, st.sampled_from([None, "s", "t"])), min_size=1, max_size=6),
    threads=st.integers(1, 3),
    pack_tokens=st.integers(1, 200),
)
def test_every_job_gets_its_own_scores(
    asked: list[tuple[Job, str | None]], threads: int, pack_tokens: int
) -> None:
    model, answers = Arithmetic(), Answers()
    model.gate.set()
    engine = make(model, threads=threads, pack_tokens=pack_tokens, cache_bytes=300)
    for ticket, (job, session) in enumerate(asked):
        engine.begin(ticket, job, answers.take(ticket), session=session)
    for ticket, (job, _) in enumerate(asked):
        assert answers.scores(ticket).margins == expected(job)
    for packed in model.packs:
        assert len(packed.ids) <= pack_tokens or len(packed.parts) == 1


def test_after_a_rest_no_thread_is_left_and_the_next_job_starts_new_ones(answers: Answers) -> None:
    model = Arithmetic()
    model.gate.set()
    engine = make(model, threads=3)
    engine.begin(1, texts("a", "b"), answers.take(1))
    answers.scores(1)
    before = list(engine._threads)
    engine.rest()
    assert len(before) == 3 and not any(thread.is_alive() for thread in before)
    engine.begin(2, texts("a", "c"), answers.take(2))
    assert answers.scores(2).margins == expected(texts("a", "c"))


@pytest.mark.parametrize(
    "error", [MemoryError, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_want_of_memory_is_told_as_such(
    model: Arithmetic, answers: Answers, error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> list[float]:
        raise error()

    monkeypatch.setattr(model, "read", read)
    make(model).begin(1, texts("a", "b"), answers.take(1))
    assert isinstance(answers.wait(1)[1], MemoryError)


def test_jobs_that_wait_share_a_pack_whatever_their_prefixes(model: Arithmetic, answers: Answers) -> None:
    engine = make(model)
    hold_up(engine, model, answers)
    for ticket in (1, 2, 3):
        engine.begin(ticket, texts(f"query {ticket}", "a", "b"), answers.take(ticket))
    model.gate.set()
    answers.wait(4)
    assert [len(packed.parts) for packed in model.packs] == [1, 3]


def test_the_shortest_work_goes_first(model: Arithmetic, answers: Answers) -> None:
    engine = make(model, pack_tokens=50)
    hold_up(engine, model, answers)
    engine.begin(1, texts("q", *("a" * length for length in range(20, 40))), answers.take(1))
    engine.begin(2, texts("q", "b" * 30), answers.take(2))
    model.gate.set()
    answers.wait(3)
    assert list(answers.outcomes) == [0, 2, 1]


def test_nothing_starves(model: Arithmetic, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "AGE_LIMIT_S", 0.0)
    engine = make(model, pack_tokens=50)
    hold_up(engine, model, answers)
    engine.begin(1, texts("q", *("a" * length for length in range(20, 40))), answers.take(1))
    engine.begin(2, texts("q", "b" * 30), answers.take(2))
    model.gate.set()
    answers.wait(3)
    assert list(answers.outcomes) == [0, 1, 2]


def test_a_job_is_divided_among_idle_threads(model: Arithmetic, answers: Answers) -> None:
    engine = make(model, threads=2, pack_tokens=1000)
    engine.begin(0, texts("q", *(f"{number:02}" * 20 for number in range(20))), answers.take(0))
    answers.wait(1)
    prefix, *halves = model.packs
    assert [part.candidates for part in prefix.parts] == [()]
    assert sorted(len(half.parts[0].candidates) for half in halves) == [10, 10]


def test_what_is_equal_is_computed_once(model: Arithmetic, answers: Answers) -> None:
    engine = make(model)
    twice = Job(Item("q", picture(1)), (Item("d", picture(2)), Item("d", picture(2)), Item("e", picture(2))))
    engine.begin(0, twice, answers.take(0))
    scores = answers.scores(0)
    assert sum(map(len, model.seen)) == 2
    assert scores.margins == expected(twice)
    assert scores.computed_tokens < scores.input_tokens


def test_images_are_remembered_up_to_a_limit(model: Arithmetic, answers: Answers) -> None:
    """An image's features here are 3 x 4 floats, 48 bytes; two of them fit."""
    engine = make(model, cache_bytes=100)
    for ticket, values in enumerate([(1, 2), (1, 2), (3, 4), (1,), (4, 3)]):
        engine.begin(
            ticket,
            Job(Item("q"), tuple(Item(None, picture(value)) for value in values)),
            answers.take(ticket),
        )
        answers.scores(ticket)
    assert [answers.scores(ticket).reused_images for ticket in range(5)] == [0, 2, 0, 0, 1]


def test_a_cancelled_job_is_not_told_and_not_computed(model: Arithmetic, answers: Answers) -> None:
    engine = make(model)
    hold_up(engine, model, answers)
    engine.begin(1, texts("one", "a"), answers.take(1))
    engine.begin(2, texts("two", "b"), answers.take(2))
    engine.cancel(1)
    engine.cancel(0)
    engine.cancel(99)
    model.gate.set()
    answers.scores(2)
    assert set(answers.outcomes) == {2}
    assert len(model.packs) == 2 and len(model.packs[1].parts) == 1


def test_an_expired_job_is_not_computed(model: Arithmetic, answers: Answers) -> None:
    engine = make(model)
    hold_up(engine, model, answers)
    engine.begin(1, texts("one", "a"), answers.take(1), deadline_s=time.monotonic() + 0.01)
    engine.begin(2, texts("two", "b"), answers.take(2), deadline_s=time.monotonic() + 60)
    time.sleep(0.05)
    model.gate.set()
    assert isinstance(answers.wait(3)[1], JobExpired)
    assert answers.scores(2).margins == expected(texts("two", "b"))
    assert len(model.packs) == 2


def test_a_job_that_fails_fails_alone(model: Arithmetic, answers: Answers) -> None:
    engine = make(model)
    hold_up(engine, model, answers)
    engine.begin(1, texts("\1", "!", "ok"), answers.take(1))
    engine.begin(2, texts("two", "b"), answers.take(2))
    engine.begin(3, texts("too long", "b"), answers.take(3))
    model.gate.set()
    outcomes = answers.wait(4)
    assert isinstance(outcomes[1], ModelFailed)
    assert isinstance(outcomes[3], JobTooLong)
    assert answers.scores(2).margins == expected(texts("two", "b"))


def test_what_breaks_is_told_and_the_thread_goes_on(
    model: Arithmetic, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(model)
    with monkeypatch.context() as patch:
        patch.setattr(model, "see", lambda images: 1 / 0)
        engine.begin(0, Job(Item("q"), (Item(None, picture(1)),)), answers.take(0))
        assert isinstance(answers.wait(1)[0], ZeroDivisionError)
    engine.begin(1, texts("q", "a"), answers.take(1))
    answers.scores(1)


def test_a_ticket_in_use_is_refused(model: Arithmetic, answers: Answers) -> None:
    engine = make(model)
    hold_up(engine, model, answers)
    with pytest.raises(ValueError, match="in use"):
        engine.begin(0, texts("q", "a"), answers.take(1))
    model.gate.set()
    answers.scores(0)


def test_it_counts_how_full_its_packs_are(model: Arithmetic, answers: Answers) -> None:
    engine = make(model, pack_tokens=20)
    assert engine.work == Work()
    engine.begin(0, texts("q", "a"), answers.take(0))  # 2 tokens each
    answers.scores(0)
    assert engine.work == Work(packs=1, packed_tokens=4, room_tokens=20)
    engine.begin(1, texts("q", "a" * 99), answers.take(1))  # more than fits: a pack of its own size
    answers.scores(1)
    assert engine.work - Work(packs=1, packed_tokens=4, room_tokens=20) == Work(1, 102, 102)


class TestSessions:
    JOB = Job(Item("q", picture(1)), (Item("d", picture(2)), Item("e"), Item("f", picture(3))))

    def ask(
        self, engine: Engine, answers: Answers, ticket: int, job: Job, session: str | None = "s"
    ) -> Scores:
        engine.begin(ticket, job, answers.take(ticket), session=session)
        return answers.scores(ticket)

    def test_the_same_again_computes_nothing(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        first = self.ask(engine, answers, 0, self.JOB)
        packs = len(model.packs)
        second = self.ask(engine, answers, 1, self.JOB)
        assert second.margins == first.margins == expected(self.JOB)
        assert (len(model.packs), second.computed_tokens) == (packs, 0)

    def test_the_same_query_keeps_its_prefix(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        self.ask(engine, answers, 0, self.JOB)
        other = Job(self.JOB.query, (Item("new"), self.JOB.candidates[1]))
        scores = self.ask(engine, answers, 1, other)
        assert scores.margins == expected(other)
        assert scores.computed_tokens == len("new") + 1
        assert not model.packs[-1].parts[0].holds_prefix

    def test_what_was_kept_and_what_was_not_is_counted(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        self.ask(engine, answers, 0, self.JOB)
        first = engine.work
        assert (first.images_kept, first.images_seen) == (0, 3)
        assert (first.prefixes_kept, first.prefixes_read) == (0, 1)
        assert (first.candidates_kept, first.candidates_read) == (0, 3)
        self.ask(engine, answers, 1, Job(self.JOB.query, (Item("new"), self.JOB.candidates[1])))
        second = engine.work - first
        assert (second.prefixes_kept, second.prefixes_read) == (1, 0)
        assert (second.candidates_kept, second.candidates_read) == (1, 1)
        self.ask(engine, answers, 2, self.JOB, None)
        third = engine.work - second - first
        assert (third.images_kept, third.images_seen) == (0, 3), "the session's are its own"
        assert third.prefixes_read == third.candidates_read == 0, "without a session there is nothing to find"

    def test_other_queries_keep_the_images(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        self.ask(engine, answers, 0, self.JOB)
        other = Job(Item("another"), self.JOB.candidates)
        scores = self.ask(engine, answers, 1, other)
        assert scores.margins == expected(other)
        assert (scores.reused_images, sum(map(len, model.seen))) == (2, 3)

    def test_sessions_share_nothing(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        self.ask(engine, answers, 0, self.JOB, "s")
        assert self.ask(engine, answers, 1, self.JOB, "t").reused_images == 0
        assert self.ask(engine, answers, 2, self.JOB, None).reused_images == 0

    def test_what_was_pinned_is_overwritten_at_the_end(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        self.ask(engine, answers, 0, self.JOB)
        pins = engine._stores[""].sessions["s"]
        tensors = [*pins.features.values()]
        for memory in pins.prefixes.values():
            tensors += [*memory.recall(0)]
        assert len(tensors) == 3 + 2 and all(tensor.abs().sum() > 0 for tensor in tensors)
        engine.end_session("s")
        assert all(tensor.abs().sum() == 0 for tensor in tensors)
        assert not pins.features and not pins.prefixes and not pins.margins and pins.size_bytes == 0
        assert self.ask(engine, answers, 1, self.JOB).reused_images == 0
        engine.end_session("never begun")

    def test_a_running_job_is_not_robbed(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        self.ask(engine, answers, 1, self.JOB)
        pins = engine._stores[""].sessions["s"]
        model.gate.clear()
        other = Job(Item("another"), self.JOB.candidates)
        engine.begin(2, other, answers.take(2), session="s")
        time.sleep(0.05)
        engine.end_session("s")
        assert pins.features
        model.gate.set()
        assert answers.scores(2).margins == expected(other)
        deadline_s = time.monotonic() + 5
        while pins.features and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert not pins.features

    def test_a_full_session_forgets_the_oldest(self) -> None:
        pins = Pins(limit_bytes=100)
        for name in (b"a", b"b", b"c"):
            pins.pin_features(name, torch.ones(3, HIDDEN))
        assert list(pins.features) == [b"b", b"c"] and pins.size_bytes == 96
        pins.pin_features(b"large", torch.ones(100, HIDDEN))
        assert list(pins.features) == [b"b", b"c"]


class TestHasher:
    def test_contents_and_shapes_and_contexts_differ(self) -> None:
        hasher = Hasher(b"weights")
        flat, tall = Pixels(2, 1, bytes(6)), Pixels(1, 2, bytes(6))
        segments = [
            hasher.segment(Segment((1, 2)), []),
            hasher.segment(Segment((1,)), []),
            hasher.segment(Segment((1, 2)), [], b"behind"),
        ]
        keys = [
            hasher.image(flat),
            hasher.image(tall),
            hasher.image(Pixels(2, 1, bytes([1] * 6))),
            *segments[:3],
        ]
        assert len(set(keys)) == len(keys)
        assert hasher.image(flat) == hasher.image(Pixels(2, 1, bytes(6)))

    def test_another_process_names_it_otherwise(self) -> None:
        assert Hasher(b"weights").image(picture(1)) != Hasher(b"weights").image(picture(1))


def test_a_cache_keeps_copies() -> None:
    cache, batch = FeatureCache(1 << 10), torch.ones(9, HIDDEN)
    cache.put(b"a", batch[:2])
    batch.zero_()
    kept = cache.get(b"a")
    assert kept is not None and kept.sum() == 2 * HIDDEN and cache.size_bytes == 2 * HIDDEN * 4
    cache.put(b"b", torch.ones(1000, HIDDEN))
    assert cache.get(b"b") is None


@pytest.fixture(autouse=True)
def _no_engine_left_waiting(model: Arithmetic) -> Iterator[None]:
    yield
    model.gate.set()


class TestTenants:
    JOB = Job(Item("q", picture(1)), (Item("d", picture(2)), Item("e")))

    def ask(
        self, engine: Engine, answers: Answers, ticket: int, tenant: str, session: str | None = None
    ) -> Scores:
        engine.begin(ticket, self.JOB, answers.take(ticket), tenant=tenant, session=session)
        return answers.scores(ticket)

    def test_what_was_seen_for_one_is_not_found_by_another(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        reused = [
            self.ask(engine, answers, ticket, tenant).reused_images
            for ticket, tenant in enumerate(("a", "a", "b", "b"))
        ]
        assert reused == [0, 2, 0, 2]

    def test_one_tenants_images_crowd_out_nobody_elses(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model, cache_bytes=3 * HIDDEN * 4 * 2)  # two pictures
        self.ask(engine, answers, 0, "a")
        for ticket in range(1, 9):
            job = Job(Item("q"), (Item("d", picture(ticket + 50)),))
            engine.begin(ticket, job, answers.take(ticket), tenant="b")
            answers.scores(ticket)
        assert self.ask(engine, answers, 9, "a").reused_images == 2

    def test_keys_of_two_tenants_never_meet(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        for ticket, tenant in enumerate("ab"):
            self.ask(engine, answers, ticket, tenant)
        keys = [set(engine._stores[tenant].cache._kept) for tenant in "ab"]
        assert len(keys[0]) == len(keys[1]) == 2
        assert keys[0].isdisjoint(keys[1])

    def test_no_pack_holds_two_tenants(self, model: Arithmetic, answers: Answers) -> None:
        engine = make(model)
        hold_up(engine, model, answers)
        for ticket, tenant in ((1, "a"), (2, "b"), (3, "a"), (4, "b")):
            engine.begin(ticket, texts(f"query {ticket}", "a", "b"), answers.take(ticket), tenant=tenant)
        model.gate.set()
        answers.wait(5)
        assert [len(packed.parts) for packed in model.packs] == [1, 2, 2]

    def test_forgetting_overwrites_all_of_one_tenant_and_nothing_of_another(
        self, model: Arithmetic, answers: Answers
    ) -> None:
        engine = make(model)
        for ticket, (tenant, session) in enumerate((("a", None), ("a", "s"), ("b", None), ("b", "s"))):
            self.ask(engine, answers, ticket, tenant, session)
        kept = {
            tenant: [
                *engine._stores[tenant].cache._kept.values(),
                *engine._stores[tenant].sessions["s"].features.values(),
            ]
            for tenant in "ab"
        }
        assert all(len(tensors) == 4 for tensors in kept.values())
        engine.forget("a")
        engine.forget("never seen")
        assert all(tensor.abs().sum() == 0 for tensor in kept["a"])
        assert all(tensor.abs().sum() > 0 for tensor in kept["b"])
        assert self.ask(engine, answers, 8, "a").reused_images == 0
        assert self.ask(engine, answers, 9, "b", "s").computed_tokens == 0

    def test_who_is_forgotten_while_a_job_runs_is_not_robbed(
        self, model: Arithmetic, answers: Answers
    ) -> None:
        engine = make(model)
        self.ask(engine, answers, 0, "a")
        store = engine._stores["a"]
        model.gate.clear()
        engine.begin(1, self.JOB, answers.take(1), tenant="a")
        time.sleep(0.05)
        engine.forget("a")
        assert store.cache.size_bytes > 0
        model.gate.set()
        assert answers.scores(1).margins == expected(self.JOB)
        deadline_s = time.monotonic() + 5
        while store.cache.size_bytes and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert store.cache.size_bytes == 0
