"""Thresholds over a real database: what is noted, who may judge what, whose vote counts, and what moves."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Table, select, text
from sqlalchemy.exc import IntegrityError

from service.adapting import Adapting
from service.deeds import Actor, Deeds
from tenants import tables
from tenants.access import INSTALLATION, Access, Role, TenantId
from tenants.adaptation import Reason, effective
from tenants.audit import Audit, decode
from tenants.canaries import Canaries, Canary
from tenants.ceiling import Ceiling
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import (
    DatabaseUnavailable,
    Invalid,
    ReviewNotFound,
    ReviewRefused,
    TenantNotFound,
    ThresholdNotFound,
)
from tenants.evidence import Evidence, Measure, Screened
from tenants.lifecycle import Lifecycle
from tenants.policies import Setter
from tenants.policy import Policy
from tenants.reviews import Place, Reviews, Verdict
from tenants.risk import Category, Mode
from tenants.thresholds import Standing, Thresholds
from tests.integration.conftest import Proxy, run_as_superuser

HATE = (Category.HATE, Mode.TEXT)
REVIEWER = Setter(Role.TENANT_ADMIN, "reviewer")
DETECTORS = "lexicon 1"


@dataclass
class Clock:
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __call__(self) -> datetime:
        return self.now

    def sleep(self, days: int = 1) -> None:
        self.now += timedelta(days=days)


@dataclass
class Bench:
    """Everything over one database, on a clock that tests turn."""

    database: Database
    directory: Directory
    clock: Clock
    evidence: Evidence
    reviews: Reviews
    thresholds: Thresholds
    canaries: Canaries
    adapting: Adapting
    audit: Audit

    async def screen(
        self,
        tenant: TenantId,
        score_of: Sequence[float],
        *,
        end_user: str | None = None,
        category: Category = Category.HATE,
        mode: Mode = Mode.TEXT,
        detectors: str = DETECTORS,
        threshold: float = 0.6,
    ) -> list[Place]:
        """Items of one decision, all drawn; written."""
        entry = uuid.uuid4()
        screened = [
            Screened(
                entry,
                f"documents[{place}]",
                mode,
                end_user or secrets.token_hex(8),
                detectors,
                [Measure(category, score, threshold, for_review=True)],
            )
            for place, score in enumerate(score_of)
        ]
        self.evidence.note(tenant, screened)
        await self.evidence.write()
        return [Place(entry, each.item, category, mode) for each in screened]

    async def vote(
        self, tenant: TenantId, verdict: Verdict, score: float, count: int, **more: object
    ) -> None:
        """So many votes of as many end users, and one step for all of them."""
        for place in await self.screen(tenant, [score] * count, **more):  # type: ignore[arg-type]
            await self.reviews.decide(tenant, place, verdict, by=REVIEWER)
        await self.thresholds.tighten(tenant, place.category, place.mode)

    async def standing(self, tenant: TenantId, category: Category, mode: Mode) -> Standing:
        return next(
            each
            for each in await self.thresholds.list(tenant)
            if (each.category, each.mode) == (category, mode)
        )

    async def live(self, tenant: TenantId, days: int) -> None:
        """Ordinary traffic of so many days, ending before today."""
        today = self.clock.now
        for ago in range(days, 0, -1):
            self.clock.now = today - timedelta(days=ago)
            for _ in range(200):
                user = secrets.token_hex(8)
                self.evidence.note(tenant, [Screened(uuid.uuid4(), "query", Mode.TEXT, user, DETECTORS, [])])
            await self.evidence.write()
        self.clock.now = today


@pytest.fixture
def bench(database: Database, directory: Directory, audit: Audit) -> Bench:
    clock = Clock()
    reviews, canaries = Reviews(database), Canaries(database)
    thresholds = Thresholds(database, directory.policies, clock=clock)
    return Bench(
        database,
        directory,
        clock,
        Evidence(database, clock=clock),
        reviews,
        thresholds,
        canaries,
        Adapting(
            deeds=Deeds(database, audit),
            lifecycle=Lifecycle(database),
            reviews=reviews,
            thresholds=thresholds,
            canaries=canaries,
        ),
        audit,
    )


@pytest.fixture
async def tenant(directory: Directory) -> TenantId:
    return (await directory.create_tenant(f"thresholds-{secrets.token_hex(6)}")).id


# -- what is noted ----------------------------------------------------------------------------------------------


async def test_traffic_adds_up_over_gateways(bench: Bench, tenant: TenantId) -> None:
    other = Evidence(bench.database, clock=bench.clock)
    for evidence in (bench.evidence, other):
        for score in (0.0, 0.05, 0.95, 0.95):
            measures = [Measure(Category.HATE, score, 0.6)]
            evidence.note(tenant, [Screened(uuid.uuid4(), "query", Mode.TEXT, "user", DETECTORS, measures)])
    await asyncio.gather(bench.evidence.write(), other.write())
    columns = tables.traffic.c
    async with bench.database.transaction(tenant) as connection:
        rows = (await connection.execute(select(tables.traffic).where(columns.category == "hate"))).all()
        users = (await connection.execute(select(tables.traffic_user.c["items"]))).scalars().all()
        categories = (await connection.execute(select(columns.category))).scalars().all()
    assert [(row.items, row.stopped, row.histogram) for row in rows] == [
        (8, 4, [4, 0, 0, 0, 0, 0, 0, 0, 0, 4])
    ]
    assert users == [8]
    assert set(categories) == {str(category) for category in Category}, "what scored 0 is traffic too"


async def test_what_an_outage_kept_from_the_database_is_written_once_it_is_over(
    proxy: Proxy, bench: Bench, tenant: TenantId
) -> None:
    database = Database(proxy.url)
    await database.open()
    try:
        evidence = Evidence(database, clock=bench.clock)
        item = Screened(
            uuid.uuid4(), "query", Mode.TEXT, "user", DETECTORS, [Measure(Category.HATE, 0.9, 0.6)]
        )
        evidence.note(tenant, [item])
        await proxy.cut()
        with pytest.raises(DatabaseUnavailable):
            await evidence.write()
        evidence.note(tenant, [item])
        await proxy.resume()
        assert await evidence.write() == 1
        assert await evidence.write() == 0
    finally:
        await database.close()
    async with bench.database.transaction(tenant) as connection:
        items = await connection.scalar(select(tables.traffic_user.c["items"]))
        reviews = (await connection.execute(select(tables.review.c.item))).all()
    assert (items, len(reviews)) == (2, 1)


async def test_a_purged_tenants_evidence_is_dropped(bench: Bench) -> None:
    gone = TenantId(uuid.uuid4())
    bench.evidence.note(gone, [Screened(uuid.uuid4(), "query", Mode.TEXT, "user", DETECTORS, [])])
    assert await bench.evidence.write() == 0


async def test_stopped_items_can_be_appealed_and_some_of_all_are_drawn(
    bench: Bench, tenant: TenantId
) -> None:
    numbers = iter([0.05, 0.5, 0.04, 0.06, 0.009, 0.011])
    evidence = Evidence(bench.database, clock=bench.clock, draw=lambda: next(numbers))
    scores = [0.9, 0.9, 0.5, 0.5, 0.2, 0.2, 0.05]
    entry = uuid.uuid4()
    for place, score in enumerate(scores):
        measures = [Measure(Category.HATE, score, 0.6)]
        evidence.note(tenant, [Screened(entry, f"{place}", Mode.TEXT, "user", DETECTORS, measures)])
    await evidence.write()
    columns = tables.review.c
    async with bench.database.transaction(tenant) as connection:
        rows = await connection.execute(
            select(columns.item, columns.stopped, columns.odds).order_by(columns.item)
        )
        kept = [tuple(row) for row in rows.all()]
    assert kept == [("0", True, 0.1), ("1", True, None), ("2", False, 0.05), ("4", False, 0.01)]


async def test_what_is_too_old_to_count_is_forgotten(bench: Bench, tenant: TenantId) -> None:
    now = bench.clock.now
    for days in (181, 179, 31, 29, 0):
        bench.clock.now = now - timedelta(days=days)
        await bench.screen(tenant, [0.9])
    short = (
        await bench.directory.create_tenant(f"short-{secrets.token_hex(6)}", Policy(retention_days=7))
    ).id
    for days in (8, 6):
        bench.clock.now = now - timedelta(days=days)
        await bench.screen(short, [0.9])
    await bench.evidence.forget()

    async def kept(table: Table, whose: TenantId) -> list[int]:
        async with bench.database.transaction(whose) as connection:
            days = (await connection.execute(select(table.c.day).distinct())).scalars().all()
        return sorted((now.date() - day).days for day in days)

    assert await kept(tables.review, tenant) == [0, 29, 31, 179]
    assert await kept(tables.traffic, tenant) == await kept(tables.traffic_user, tenant) == [0, 29]
    assert await kept(tables.review, short) == [6]


# -- who may judge what -----------------------------------------------------------------------------------------


async def undrawn(bench: Bench, tenant: TenantId) -> Place:
    """A stopped item that nobody drew."""
    evidence = Evidence(bench.database, clock=bench.clock, draw=lambda: 0.999)
    entry = uuid.uuid4()
    measures = [Measure(Category.HATE, 0.9, 0.6)]
    evidence.note(tenant, [Screened(entry, "query", Mode.TEXT, "user", DETECTORS, measures)])
    await evidence.write()
    return Place(entry, "query", *HATE)


async def test_nobody_picks_what_is_judged(bench: Bench, tenant: TenantId) -> None:
    place = await undrawn(bench, tenant)
    with pytest.raises(ReviewRefused):
        await bench.reviews.decide(tenant, place, Verdict.HARMLESS, by=REVIEWER)
    _, is_new = await bench.reviews.appeal(tenant, place)
    _, again = await bench.reviews.appeal(tenant, place)
    assert (is_new, again) == (True, False)
    (waiting,) = await bench.reviews.waiting(tenant, most=10)
    assert (waiting.place, waiting.drawn, waiting.verdict) == (place, False, None)
    review, _ = await bench.reviews.decide(tenant, place, Verdict.HARMLESS, by=REVIEWER)
    assert (review.verdict, review.decided_by, review.votes) == (Verdict.HARMLESS, REVIEWER, True)
    assert await bench.reviews.waiting(tenant, most=10) == ()


async def test_what_was_not_stopped_cannot_be_appealed(bench: Bench, tenant: TenantId) -> None:
    (passed,) = await bench.screen(tenant, [0.5])
    for place in (passed, replace(passed, item="documents[9]"), replace(passed, entry_id=uuid.uuid4())):
        with pytest.raises(ReviewNotFound):
            await bench.reviews.appeal(tenant, place)
    with pytest.raises(ReviewNotFound):
        await bench.reviews.decide(tenant, replace(passed, mode=Mode.IMAGE), Verdict.HARMFUL, by=REVIEWER)


async def test_a_decision_is_made_once(bench: Bench, tenant: TenantId) -> None:
    (place,) = await bench.screen(tenant, [0.9])
    outcomes = await asyncio.gather(
        *(bench.reviews.decide(tenant, place, Verdict.HARMFUL, by=REVIEWER) for _ in range(4))
    )
    assert sorted(is_new for _, is_new in outcomes) == [False, False, False, True]
    with pytest.raises(ReviewRefused):
        await bench.reviews.decide(tenant, place, Verdict.HARMLESS, by=REVIEWER)


async def test_an_end_user_has_one_vote_a_day_in_each_category_and_mode(
    bench: Bench, tenant: TenantId
) -> None:
    same_day = await bench.screen(tenant, [0.9, 0.8, 0.7], end_user="one")
    outcomes = await asyncio.gather(
        *(bench.reviews.decide(tenant, place, Verdict.HARMLESS, by=REVIEWER) for place in same_day)
    )
    assert sorted(review.votes for review, _ in outcomes) == [False, False, True]
    others = [
        *await bench.screen(tenant, [0.9], end_user="two"),
        *await bench.screen(tenant, [0.9], end_user="one", mode=Mode.IMAGE),
        *await bench.screen(tenant, [0.9], end_user="one", category=Category.GORE),
    ]
    bench.clock.sleep()
    others += await bench.screen(tenant, [0.9], end_user="one")
    for place in others:
        review, _ = await bench.reviews.decide(tenant, place, Verdict.HARMLESS, by=REVIEWER)
        assert review.votes


async def test_the_database_itself_refuses_a_second_vote(bench: Bench, tenant: TenantId) -> None:
    for place in await bench.screen(tenant, [0.9, 0.8], end_user="one"):
        await bench.reviews.decide(tenant, place, Verdict.HARMLESS, by=REVIEWER)
    with pytest.raises(IntegrityError, match="review_vote"):
        async with bench.database.transaction(tenant) as connection:
            await connection.execute(text("update pericarp.review set votes = true"))


async def test_a_vote_weighs_inversely_to_what_its_end_user_sent(bench: Bench, tenant: TenantId) -> None:
    """Sixty end users' misses outweigh sixty false alarms of users who sent fifty items each."""
    await bench.vote(tenant, Verdict.HARMFUL, 0.45, 60)
    for _ in range(60):
        user = secrets.token_hex(8)
        (place, *_rest) = await bench.screen(tenant, [0.58] * 50, end_user=user, threshold=0.55)
        await bench.reviews.decide(tenant, place, Verdict.HARMLESS, by=REVIEWER)
    bench.clock.sleep()
    await bench.thresholds.step(tenant)
    (last, *_) = await bench.thresholds.history(tenant)
    assert last.reason is Reason.TIGHTER
    assert last.evidence["aim"] < 0.6


async def test_who_judged_too_late_to_tell_how_much_was_sent_has_no_vote(
    bench: Bench, tenant: TenantId, superuser_url: str
) -> None:
    (place,) = await bench.screen(tenant, [0.9])
    await run_as_superuser(superuser_url, f"delete from pericarp.traffic_user where tenant_id = '{tenant}'")
    review, _ = await bench.reviews.decide(tenant, place, Verdict.HARMLESS, by=REVIEWER)
    assert (review.verdict, review.votes) == (Verdict.HARMLESS, False)


async def test_the_queue_is_read_page_by_page(bench: Bench, tenant: TenantId) -> None:
    places = {place for _ in range(3) for place in await bench.screen(tenant, [0.9, 0.5])}
    seen: list[Place] = []
    after = None
    while page := await bench.reviews.waiting(tenant, most=2, after=after):
        seen += [review.place for review in page]
        after = (page[-1].screened_at, page[-1].place)
    assert len(seen) == 6 and set(seen) == places


# -- what moves -------------------------------------------------------------------------------------------------


async def test_misses_make_it_stricter_at_once_and_every_gateway_reads_it(
    bench: Bench, tenant: TenantId, directory: Directory, access: Access
) -> None:
    _, key = await directory.keys.create(tenant, Role.SEARCH)
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 50)
    assert await bench.thresholds.in_force(tenant, *HATE) == 0.59
    caller = await access.authenticate(key)
    assert effective(caller.policy, caller.adapted, *HATE) == 0.59
    assert effective(caller.policy, caller.adapted, Category.HATE, Mode.IMAGE) == 0.6
    bench.clock.sleep()
    (change,) = await bench.thresholds.step(tenant)
    assert (change.before, change.after, change.reason, change.version) == (0.59, 0.58, Reason.TIGHTER, 2)
    assert change.evidence["votes"] == change.evidence["harmful"] == 50
    assert await bench.thresholds.step(tenant) == (), "a day has one way"


async def test_it_never_leaves_its_bounds_however_long_it_is_pulled(bench: Bench, tenant: TenantId) -> None:
    await bench.vote(tenant, Verdict.HARMFUL, 0.21, 120)
    for _ in range(14):
        bench.clock.sleep()
        await bench.thresholds.step(tenant)
    assert await bench.thresholds.in_force(tenant, *HATE) == 0.5
    history = await bench.thresholds.history(tenant)
    assert all(0 < change.before - change.after <= 0.01 + 1e-9 for change in history)


async def test_false_alarms_make_it_looser_only_with_canaries_and_a_week_of_traffic(
    bench: Bench, tenant: TenantId
) -> None:
    await bench.vote(tenant, Verdict.HARMLESS, 0.75, 60)
    bench.clock.sleep()
    assert await bench.thresholds.step(tenant) == ()
    await bench.canaries.set(INSTALLATION, [Canary(*HATE, "slur", 0.95, DETECTORS)])
    bench.clock.sleep(1)
    assert await bench.thresholds.step(tenant) == (), "no week of traffic yet"
    bench.clock.sleep(9)
    await bench.live(tenant, 9)
    (change,) = await bench.thresholds.step(tenant)
    assert (change.before, change.after, change.reason) == (0.6, 0.605, Reason.LOOSER)
    assert (change.evidence["recall_before"], change.evidence["recall_after"]) == (1, 1)
    await bench.canaries.set(tenant, [Canary(*HATE, f"c{place}", 0.606, DETECTORS) for place in range(50)])
    bench.clock.sleep()
    assert await bench.thresholds.step(tenant) == (), "half of the canaries would pass"
    await bench.canaries.set(INSTALLATION, [])


async def test_it_stands_still_while_few_users_send_much(bench: Bench, tenant: TenantId) -> None:
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 60)
    before = await bench.thresholds.in_force(tenant, *HATE)
    bench.clock.sleep()
    for end_user in [*("flood" for _ in range(60)), *(secrets.token_hex(8) for _ in range(120))]:
        bench.evidence.note(tenant, [Screened(uuid.uuid4(), "query", Mode.TEXT, end_user, DETECTORS, [])])
    await bench.evidence.write()
    (change,) = await bench.thresholds.step(tenant)
    assert (change.reason, change.frozen, change.after) == (Reason.FROZEN, "few_users", before)
    assert (await bench.standing(tenant, *HATE)).frozen == "few_users"
    bench.clock.sleep(2)
    (change,) = await bench.thresholds.step(tenant)
    assert (change.reason, change.frozen) == (Reason.TIGHTER, "")


async def test_new_detectors_begin_anew_and_old_votes_count_no_more(bench: Bench, tenant: TenantId) -> None:
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 60)
    bench.clock.sleep()
    await bench.screen(tenant, [0.1], detectors="lexicon 2")
    (change,) = await bench.thresholds.step(tenant)
    assert (change.after, change.reason, change.evidence["votes"]) == (0.6, Reason.NEW_DETECTORS, 0)


async def test_another_policy_and_a_lower_ceiling_hold_at_once(bench: Bench, tenant: TenantId) -> None:
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 60)
    await bench.directory.policies.set(tenant, Policy(risk_thresholds=((Category.HATE, 0.7),)))
    assert await bench.thresholds.in_force(tenant, *HATE) == 0.7
    bench.clock.sleep()
    (change,) = await bench.thresholds.step(tenant)
    assert (change.reason, change.after) == (Reason.NEW_ANCHOR, 0.7)
    async with bench.database.transaction(tenant) as connection:
        await connection.execute(text("update pericarp.threshold set threshold = 0.8"))
    assert await bench.thresholds.in_force(tenant, *HATE) == 0.8
    await bench.directory.policies.set_ceiling(Ceiling(risk_threshold=0.75), tenant=tenant)
    assert await bench.thresholds.in_force(tenant, *HATE) == 0.75
    bench.clock.sleep()
    (change,) = await bench.thresholds.step(tenant)
    assert (change.reason, change.after) == (Reason.NEW_BOUNDS, 0.75)


async def test_a_caller_carries_the_ceiling_of_what_was_learnt(
    bench: Bench, tenant: TenantId, directory: Directory, access: Access
) -> None:
    _, key = await directory.keys.create(tenant, Role.SEARCH)
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 60)
    async with bench.database.transaction(tenant) as connection:
        await connection.execute(text("update pericarp.threshold set threshold = 0.69"))
    caller = await access.authenticate(key)
    assert effective(caller.policy, caller.adapted, *HATE) == 0.69
    await bench.directory.policies.set_ceiling(Ceiling(risk_threshold=0.65), tenant=tenant)
    caller = await access.authenticate(key)
    assert effective(caller.policy, caller.adapted, *HATE) == 0.65


async def test_of_many_who_step_at_once_one_goes_the_days_way(bench: Bench, tenant: TenantId) -> None:
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 60)
    bench.clock.sleep()
    changes = await asyncio.gather(*(bench.thresholds.step(tenant) for _ in range(4)))
    assert sorted(len(each) for each in changes) == [0, 0, 0, 1]


# -- rollback, the log, other tenants ---------------------------------------------------------------------------


async def test_a_rollback_is_one_call_and_what_was_learnt_is_not_learnt_again(
    bench: Bench, tenant: TenantId
) -> None:
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 60)
    for _ in range(3):
        bench.clock.sleep()
        await bench.thresholds.step(tenant)
    assert await bench.thresholds.in_force(tenant, *HATE) == 0.56
    actor = Actor(Role.TENANT_ADMIN, "a-key")
    (change,) = await bench.adapting.roll_back(actor, tenant)
    assert (change.before, change.after, change.reason) == (0.56, 0.6, Reason.ROLLBACK)
    assert change.set_by == Setter(Role.TENANT_ADMIN, "a-key")
    bench.clock.sleep()
    assert await bench.thresholds.step(tenant) == ()
    assert await bench.thresholds.in_force(tenant, *HATE) == 0.6
    (change,) = await bench.adapting.roll_back(Actor("operator"), tenant, *HATE, version=2)
    assert change.after == 0.58


async def test_a_rollback_leads_nowhere_that_the_policy_does_not_allow(
    bench: Bench, tenant: TenantId
) -> None:
    with pytest.raises(ThresholdNotFound):
        await bench.adapting.roll_back(Actor("operator"), tenant, *HATE)
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 60)
    with pytest.raises(ThresholdNotFound):
        await bench.adapting.roll_back(Actor("operator"), tenant, *HATE, version=9)
    await bench.directory.policies.set(tenant, Policy(risk_thresholds=((Category.HATE, 0.8),)))
    with pytest.raises(Invalid, match=r"was 0\.59"):
        await bench.adapting.roll_back(Actor("operator"), tenant, *HATE, version=1)


async def test_every_change_is_an_entry_with_its_evidence_in_the_same_transaction(
    bench: Bench, tenant: TenantId
) -> None:
    places = await bench.screen(tenant, [0.4] * 51)
    for place in places[:49]:
        await bench.reviews.decide(tenant, place, Verdict.HARMFUL, by=REVIEWER)
    actor = Actor(Role.TENANT_ADMIN, "a-key")
    review, change = await bench.adapting.label(actor, tenant, places[49], Verdict.HARMFUL)
    assert review.votes and change is not None and actor.receipt is not None
    (recorded,) = await bench.audit.list_entries(tenant)
    entry = decode(recorded.body)
    assert (str(recorded.id), entry.operation, entry.key_id) == (
        actor.receipt,
        "admin.threshold_label",
        "a-key",
    )
    assert entry.details["verdict"] == "harmful" and entry.details["entry"] == str(places[49].entry_id)
    assert entry.details["changes"] == [
        {
            "category": "hate",
            "mode": "text",
            "version": 1,
            "before": 600_000,
            "after": 590_000,
            "anchor": 600_000,
            "reason": "tighter",
            "frozen": "",
            "votes": 50,
            "harmful": 50,
            "aim": 560_000,
        }
    ]
    again = Actor(Role.TENANT_ADMIN, "a-key")
    await bench.adapting.label(again, tenant, places[49], Verdict.HARMFUL)
    assert again.receipt is None and len(await bench.audit.list_entries(tenant)) == 1
    bench.clock.sleep()
    await bench.adapting.step(tenant)
    newest = decode((await bench.audit.list_entries(tenant))[0].body)
    assert (newest.operation, newest.role) == ("admin.threshold_step", "gateway")


async def test_without_its_entry_a_label_and_its_change_do_not_stand(bench: Bench, tenant: TenantId) -> None:
    places = await bench.screen(tenant, [0.4] * 50)
    for place in places[:49]:
        await bench.reviews.decide(tenant, place, Verdict.HARMFUL, by=REVIEWER)
    taken = Actor(Role.TENANT_ADMIN, "a-key")
    await bench.adapting.appeal(taken, tenant, await undrawn(bench, tenant))
    with pytest.raises(IntegrityError):  # a request has one entry, and this one has it already
        await bench.adapting.label(taken, tenant, places[49], Verdict.HARMFUL)
    assert await bench.thresholds.in_force(tenant, *HATE) == 0.6
    assert places[49] in {each.place for each in await bench.reviews.waiting(tenant, most=100)}


async def test_the_daily_step_comes_to_every_tenant_once(bench: Bench, directory: Directory) -> None:
    tenants = [(await directory.create_tenant(f"due-{secrets.token_hex(6)}")).id for _ in range(2)]
    for each in tenants:
        await bench.vote(each, Verdict.HARMFUL, 0.4, 50)
        async with bench.database.transaction(each) as connection:
            await connection.execute(
                text("update pericarp.threshold set stepped_on = stepped_on - 1, day = day - 1")
            )
    assert set(tenants) <= {TenantId(each) for each in await bench.thresholds.due()}
    told: list[TenantId] = []
    await bench.adapting.step_due(lambda whose, _changes: told.append(whose))
    assert set(tenants) <= set(told)
    assert not set(tenants) & {TenantId(each) for each in await bench.thresholds.due()}


async def test_what_is_a_tenants_own_is_nobody_elses(
    bench: Bench, tenant: TenantId, directory: Directory
) -> None:
    other = (await directory.create_tenant(f"thresholds-{secrets.token_hex(6)}")).id
    (place,) = await bench.screen(tenant, [0.9])
    await bench.vote(tenant, Verdict.HARMFUL, 0.4, 60)
    await bench.canaries.set(tenant, [Canary(*HATE, "mine", 0.9, DETECTORS)])
    with pytest.raises(ReviewNotFound):
        await bench.reviews.decide(other, place, Verdict.HARMFUL, by=REVIEWER)
    with pytest.raises(ReviewNotFound):
        await bench.reviews.appeal(other, place)
    with pytest.raises(ThresholdNotFound):
        await bench.thresholds.roll_back(other, *HATE, by=REVIEWER)
    assert await bench.thresholds.in_force(other, *HATE) == 0.6
    assert await bench.thresholds.history(other) == ()
    assert await bench.reviews.waiting(other, most=10) == ()
    assert await bench.canaries.list(other) == ()
    assert await bench.canaries.scores(other, *HATE, DETECTORS) == ()


async def test_an_unknown_tenant_has_no_thresholds(bench: Bench) -> None:
    nobody = TenantId(uuid.uuid4())
    for asked in (bench.thresholds.list(nobody), bench.thresholds.step(nobody)):
        with pytest.raises(TenantNotFound):
            await asked


async def test_canaries_are_refused_whole_with_every_fault(bench: Bench, tenant: TenantId) -> None:
    good = Canary(*HATE, "a", 0.9, DETECTORS)
    await bench.canaries.set(tenant, [good])
    with pytest.raises(Invalid) as caught:
        await bench.canaries.set(tenant, [good, good, replace(good, name="", score=1.5)])
    assert {fault.field for fault in caught.value.faults} == {
        "canaries",
        "canaries[2].name",
        "canaries[2].score",
    }
    assert await bench.canaries.list(tenant) == (good,)
