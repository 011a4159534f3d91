"""Whatever happens to a log, in whatever order: it is accepted exactly where nobody has tampered with it.

Accepted is what the sequencer goes on with and `tools/verify.py` finds whole, beside every checkpoint that was kept.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import make_url

from tenants import embedded
from tenants.access import TenantId
from tenants.audit import Audit
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import LogBroken, ReceiptPending
from tenants.log_export import export_log
from tenants.provisioning import Urls
from tenants.pruning import Pruning
from tenants.sequencer import Sequencer, log_signer
from tests.integration.conftest import Secrets, run_as_superuser, with_database
from tests.integration.test_audit import entry_for
from tests.integration.test_tampering import DISARM, FLIP
from tests.unit.test_verify import verify

pytestmark = pytest.mark.timeout(900)

Result = TypeVar("Result")
SIGNER = log_signer(secrets.token_bytes(32))
OF_LEAF = "pericarp.audit_leaf l where l.index = {index} and (i.tenant_id, i.id) = (l.tenant_id, l.id)"
TAMPERING = {
    "body": f"update pericarp.audit_inbox i set body = {FLIP.format('body', 9)} from {OF_LEAF}",
    "gone": f"update pericarp.audit_inbox i set body = null from {OF_LEAF}",
    "row": f"update pericarp.audit_inbox i set orphan = not orphan from {OF_LEAF}",
    "entry": f"delete from pericarp.audit_inbox i using {OF_LEAF}",
    "hash": f"update pericarp.audit_leaf set envelope = {FLIP.format('envelope', 99)} where index = {{index}}",
    "leaf": "delete from pericarp.audit_leaf where index = {index}",
    "tile": f"update pericarp.audit_tile set hashes = {FLIP.format('hashes', '32 * {index}')} where level = 0",
    "signature": "update pericarp.audit_checkpoint set note = overlay(note placing 'AAAA' from length(note) - 20)"
    " where size = (select max(size) from pericarp.audit_checkpoint)",
    "checkpoint": "delete from pericarp.audit_checkpoint"
    " where size = (select max(size) from pericarp.audit_checkpoint)",
}
"""What is done to the leaf at `index`, or to the newest checkpoint."""


ROLL_BACK = (
    "delete from pericarp.audit_waiting",
    "delete from pericarp.audit_inbox i where not exists (select from pericarp.audit_leaf l"
    " where (l.tenant_id, l.id) = (i.tenant_id, i.id) and l.index < 3)",
    "delete from pericarp.audit_leaf where index >= 3",
    "delete from pericarp.audit_checkpoint where size > 3",
    "update pericarp.audit_tile set hashes = substring(hashes from 1 for 96)",
)


class Log(RuleBasedStateMachine):
    """One log, its sequencer, and whoever means it harm."""

    server: embedded.Server
    template: Urls
    kept_secrets: Secrets

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.name = f"states_{secrets.token_hex(6)}"
        self.do(
            run_as_superuser(
                self.server.superuser_url,
                f"create database {self.name} template {make_url(self.template.app_url).database} owner pericarp_owner",
                f"revoke all on database {self.name} from public",
                f"grant connect on database {self.name} to pericarp_app",
            )
        )
        self.owner_url = with_database(self.template.owner_url, self.name)
        self.app_url = with_database(self.template.app_url, self.name)
        self.superuser_url = with_database(self.server.superuser_url, self.name)
        self.database = Database(self.app_url)
        self.do(self.database.open())
        directory = Directory(
            self.database, pepper=self.kept_secrets.pepper, master_key=self.kept_secrets.master_key
        )
        self.pruning = Pruning(self.database)
        self.audit = Audit(self.database, master_key=self.kept_secrets.master_key)
        self.tenant: TenantId = self.do(directory.create_tenant("one")).id
        self.sequencer = Sequencer(self.database, SIGNER)
        self.recorded = self.size = 0
        self.kept: list[str] = []
        self.fate: str | None = None
        self.place = 0.0
        self.honest = True
        self.found = False

    def teardown(self) -> None:
        try:
            if self.honest and self.fate is not None:
                self.strike()
            self.judge()
        finally:
            self.do(self.database.close())
            self.do(run_as_superuser(self.server.superuser_url, f"drop database {self.name} with (force)"))
            self.runner.close()

    def do(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    @rule(count=st.integers(1, 5))
    def append(self, count: int) -> None:
        for _ in range(count):
            self.do(self.audit.record(entry_for(self.tenant)))
        self.recorded += count

    @rule()
    def integrate(self) -> None:
        try:
            step = self.do(self.sequencer.step())
        except LogBroken:
            assert not self.honest, "an honest log is never stopped"
            self.found = True
        else:
            self.size += step.integrated
            assert not self.honest or self.size == step.size == self.recorded

    @precondition(lambda self: self.honest)
    @rule(place=st.floats(0, 1, exclude_max=True))
    def erase(self, place: float) -> None:
        """The body of one entry goes, by another's word; where only such words have a body left, one comes for it."""
        if (victim := self.do(self._with_body(place))) is None:
            self.append(1)
            victim = self.do(self._with_body(place))

        async def say() -> UUID:
            details = {"reason": "asked", "rows": 0, "entries": [str(victim)]}
            word = entry_for(self.tenant, operation="admin.subject_erase", details=details)
            async with self.database.together():
                written = await self.audit.append(self.tenant, word)
                await self.pruning.issue(self.tenant, written)
            return written

        warrant = self.do(say())
        self.recorded += 1
        self.integrate()
        assert self.do(self.pruning.prune(self.tenant, warrant)) == 1

    @rule(written=st.booleans())
    def crash(self, written: bool) -> None:
        """A step breaks off, before its leaves are written or before they are committed."""

        async def break_off() -> None:
            victim = await asyncpg.connect(self.app_url)
            await victim.execute("set role pericarp_quota")
            await victim.execute("begin")
            row = await victim.fetchrow("select * from pericarp.begin_integration(3)")
            if written and row is not None and row["positions"] and row["leaves"] == (row["size"] or 0):
                await victim.execute(
                    "select pericarp.integrate($1, $2, '{7}', '{7}', $3, $4, 'never')",
                    row["size"] or 0,
                    row["positions"],
                    [bytes(32)],
                    bytes(32),
                )
            await victim.close()

        self.do(break_off())

    @rule()
    def restart(self) -> None:
        """The gateway forgets which tree it has seen."""
        self.sequencer = Sequencer(self.database, SIGNER)

    @precondition(lambda self: self.honest and self.size > 0)
    @rule()
    def keep(self) -> None:
        self.kept.append(self.do(self._newest()))

    @initialize(
        fate=st.none() | st.sampled_from([*sorted(TAMPERING), "roll back"]),
        place=st.floats(0, 1, exclude_max=True),
    )
    def choose(self, fate: str | None, place: float) -> None:
        """What will be done to this log, by whom it does not know, and how far into it; perhaps nothing."""
        self.fate, self.place = fate, place
        self.append(3)
        self.integrate()
        self.keep()
        self.append(2)
        self.integrate()

    @precondition(lambda self: self.honest and self.fate is not None)
    @rule()
    def strike(self) -> None:
        assert self.fate is not None
        self.keep()  # somebody always has the newest checkpoint
        if self.fate == "roll back":  # to a copy of the database from when it had three leaves
            statements: tuple[str, ...] = ROLL_BACK
        else:
            victim = self.do(self._with_body(self.place, integrated=True))
            index = self.do(self._ask("select index from pericarp.audit_leaf where id = $1", victim))
            statements = (TAMPERING[self.fate].format(index=index),)
        self.do(run_as_superuser(self.superuser_url, *DISARM, *statements))
        self.honest = False

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.honest:
            assert self.do(self._count()) == self.recorded

    def judge(self) -> None:
        """Whoever wants to know: first the sequencer takes what waits, then the verifier reads an export."""
        self.integrate()
        wrong = self.found
        lines: list[bytes] = []
        export = verify.Export(
            verify.Key.parse(SIGNER.key.text),
            [verify.open_note(note, verify.Key.parse(SIGNER.key.text)) for note in self.kept],
            [],
            0,
            verify.Pruned(lambda: lines),
        )
        try:
            lines += self.do(self._lines())
            for line in lines:
                export.read(line)
            export.end()
        except verify.Wrong:
            wrong = True
        except ReceiptPending:  # no checkpoint is left, so there is nothing to export
            wrong = True
        assert wrong != self.honest

    async def _lines(self) -> list[bytes]:
        return [line async for line in export_log(self.owner_url)]

    async def _newest(self) -> str:
        note: str = (await self.database.call("select pericarp.newest_checkpoint()"))[0][0]
        return note

    async def _count(self) -> int:
        count: int = await self._ask(
            "select (select count(*) from pericarp.audit_leaf) + (select count(*) from pericarp.audit_waiting)"
        )
        return count

    async def _with_body(self, place: float, *, integrated: bool = False) -> UUID | None:
        """Of the entries that still have their body, the one that lies so far in: of those in the tree, or of those that
        say of no other that its body goes. None where there is no such entry."""
        ids: list[UUID] | None = await self._ask(
            "select array_agg(i.id order by i.recorded_at) from pericarp.audit_inbox i where i.body is not null"
            " and (not $1 or exists (select from pericarp.audit_leaf l where l.id = i.id))"
            " and ($1 or not exists (select from pericarp.audit_warrant w where w.id = i.id))",
            integrated,
        )
        return ids[int(place * len(ids))] if ids else None

    async def _ask(self, query: str, *arguments: object) -> Any:
        connection = await asyncpg.connect(self.superuser_url)
        try:
            return await connection.fetchval(query, *arguments)
        finally:
            await connection.close()


@pytest.fixture
def machine(
    postgres_server: embedded.Server, template: Urls, installation_secrets: Secrets
) -> Iterator[type[Log]]:
    Log.server, Log.template, Log.kept_secrets = postgres_server, template, installation_secrets
    yield Log


def explore(machine: type[Log], **chosen: Any) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck), **chosen
        ),
    )


def test_a_log_is_accepted_exactly_where_its_history_is_honest(machine: type[Log]) -> None:
    explore(machine, max_examples=15, derandomize=True)


@pytest.mark.campaign
def test_whatever_else_happens_to_a_log_it_is_accepted_exactly_where_that_is_honest(
    machine: type[Log],
) -> None:
    explore(machine, max_examples=60)
