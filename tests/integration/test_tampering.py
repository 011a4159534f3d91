"""The tamper matrix: whatever a superuser of the database changes in the log is found, and said by name.

An honest log of 300 entries with checkpoints at 100, 200 and 300 is copied for every mutation. Three look at the copy: a
sequencer that starts on it, one that has seen the tree before (and whoever kept a checkpoint), and `tools/verify.py` on an
export.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url

from tenants import embedded, merkle
from tenants.audit import Audit
from tenants.checkpoint import Checkpoint, Proof
from tenants.database import Database
from tenants.directory import Directory
from tenants.errors import LogBroken, ReceiptPending
from tenants.log_export import export_log
from tenants.proofs import Proofs
from tenants.provisioning import Urls
from tenants.sequencer import Sequencer, log_signer
from tests.integration.conftest import Secrets, run_as_superuser, with_database
from tests.integration.test_audit import entry_for
from tests.integration.test_receipts import VERIFY

SIZE, STEP, VICTIM = 300, 100, 137
SIGNER = log_signer(secrets.token_bytes(32))
NAMES = ("first", "second")
_copies = itertools.count(1)

DISARM = tuple(
    f"alter table pericarp.{table} disable trigger all"
    for table in ("audit_inbox", "audit_waiting", "audit_leaf", "audit_tile", "audit_checkpoint")
)
"""What a superuser, or the tables' owner, does before anything else."""
OF_VICTIM = f"pericarp.audit_leaf l where l.index = {VICTIM} and (i.tenant_id, i.id) = (l.tenant_id, l.id)"
FLIP = "set_byte({0}, {1}, get_byte({0}, {1}) # 1)"
EDIT_BODY = f"update pericarp.audit_inbox i set body = {FLIP.format('body', 9)} from {OF_VICTIM}"
EDIT_HASH = f"""
    update pericarp.audit_leaf l set envelope = substring(l.envelope from 1 for 80) || sha256(i.body)
      from pericarp.audit_inbox i where l.index = {VICTIM} and (i.tenant_id, i.id) = (l.tenant_id, l.id)
"""
EDIT_TILE = f"""
    update pericarp.audit_tile set hashes = overlay(hashes placing
           sha256('\\x00'::bytea || (select envelope from pericarp.audit_leaf where index = {VICTIM}))
           from {32 * VICTIM + 1})
     where level = 0 and number = 0
"""
NEWEST = f"where size = {SIZE}"
EDGE = f"index = {SIZE - 1}"


@dataclass(frozen=True, slots=True)
class Mutation:
    """What is done, and what must be said of it."""

    name: str
    statements: tuple[str, ...]
    verify: str
    """In what `tools/verify.py` says."""
    sequencer: str = ""
    """In what a sequencer says that starts on it; empty: it goes on, for what it builds on is whole."""
    late: bool = False
    """Whether it is done while two entries wait, which are integrated afterwards."""


MUTATIONS = (
    Mutation("body", (EDIT_BODY,), f"index {VICTIM}: the body"),
    Mutation(
        "body with a line end",
        (f"update pericarp.audit_inbox i set body = set_byte(body, 9, 10) from {OF_VICTIM}",),
        f"index {VICTIM}: the body",
    ),
    Mutation(
        "recorded hash",
        (f"update pericarp.audit_leaf set envelope = {FLIP.format('envelope', 90)} where index = {VICTIM}",),
        f"index {VICTIM}: the body",
    ),
    Mutation("body and hash", (EDIT_BODY, EDIT_HASH), f"index {VICTIM}: the leaf"),
    Mutation(
        "body, hash and tile",
        (EDIT_BODY, EDIT_HASH, EDIT_TILE),
        "from index 100 on, below 200: something does not lead to the root",
    ),
    Mutation(
        "time of a row",
        (
            f"update pericarp.audit_inbox i set recorded_at = recorded_at - interval '1 hour' from {OF_VICTIM}",
        ),
        f"index {VICTIM}: the stored row",
    ),
    Mutation(
        "time of a leaf",
        (f"update pericarp.audit_leaf set envelope = {FLIP.format('envelope', 30)} where index = {VICTIM}",),
        f"index {VICTIM}: the stored row",
    ),
    Mutation(
        "request of a row",
        (f"update pericarp.audit_inbox i set request_id = gen_random_uuid() from {OF_VICTIM}",),
        f"index {VICTIM}: the stored row",
    ),
    Mutation(
        "entry deleted",
        (f"delete from pericarp.audit_inbox i using {OF_VICTIM}",),
        f"index {VICTIM}: the body is missing",
    ),
    Mutation(
        "entry slipped in",
        (
            "insert into pericarp.audit_inbox (tenant_id, request_id, schema_version, body)"
            " select tenant_id, gen_random_uuid(), 1, body from pericarp.audit_inbox limit 1",
        ),
        " is not in the tree",
    ),
    Mutation(
        "leaf deleted",
        (f"delete from pericarp.audit_leaf where index = {VICTIM}",),
        f"index {VICTIM} is missing",
    ),
    Mutation(
        "leaf and entry deleted",
        (
            f"delete from pericarp.audit_inbox i using {OF_VICTIM}",
            f"delete from pericarp.audit_leaf where index = {VICTIM}",
        ),
        f"index {VICTIM} is missing",
    ),
    Mutation(
        "last leaf deleted",
        (f"delete from pericarp.audit_leaf where {EDGE}",),
        f"index {SIZE - 1} is missing",
        sequencer="is stored with 299",
    ),
    Mutation(
        "leaf inserted",
        (
            "insert into pericarp.audit_leaf select tenant_id, gen_random_uuid(), 300, envelope"
            " from pericarp.audit_leaf where index = 0",
        ),
        f"index {SIZE} lies beyond",
        sequencer="is stored with 301",
    ),
    Mutation(
        "leaves swapped",
        (
            f"update pericarp.audit_leaf set index = -1 where index = {VICTIM}",
            f"update pericarp.audit_leaf set index = {VICTIM} where index = {VICTIM + 1}",
            f"update pericarp.audit_leaf set index = {VICTIM + 1} where index = -1",
        ),
        f"index {VICTIM}: the leaf",
    ),
    Mutation(
        "hash in a full tile",
        (
            f"update pericarp.audit_tile set hashes = {FLIP.format('hashes', 32 * VICTIM)}"
            " where level = 0 and number = 0",
        ),
        f"index {VICTIM}: the leaf",
    ),
    Mutation(
        "hash at the edge",
        (
            f"update pericarp.audit_tile set hashes = {FLIP.format('hashes', 32 * 4)} where level = 0 and number = 1",
        ),
        "index 260: the leaf",
        sequencer="do not lead to its root",
    ),
    Mutation(
        "hash of an upper tile",
        (f"update pericarp.audit_tile set hashes = {FLIP.format('hashes', 7)} where level = 1",),
        "tile 1/0",
        sequencer="do not lead to its root",
    ),
    Mutation(
        "tile cut short",
        (
            "update pericarp.audit_tile set hashes = substring(hashes from 1 for 64) where level = 0 and number = 1",
        ),
        "tile 0/1 is missing",
        sequencer="a tile is shorter",
    ),
    Mutation(
        "tile deleted",
        ("delete from pericarp.audit_tile where level = 0 and number = 0",),
        "is missing",
    ),
    Mutation(
        "upper tile deleted",
        ("delete from pericarp.audit_tile where level = 1",),
        "tile 1/0 is missing",
        sequencer="a tile is shorter",
    ),
    Mutation(
        "size of the newest checkpoint",
        (f"update pericarp.audit_checkpoint set note = replace(note, E'\\n300\\n', E'\\n299\\n') {NEWEST}",),
        "the newest checkpoint: its signature does not hold",
        sequencer="not signed by",
    ),
    Mutation(
        "signature of the newest checkpoint",
        (
            f"update pericarp.audit_checkpoint set note = overlay(note placing 'AAAA' from length(note) - 20) {NEWEST}",
        ),
        "the newest checkpoint: its signature does not hold",
        sequencer="not signed by",
    ),
    Mutation(
        "signature of an older checkpoint",
        (
            "update pericarp.audit_checkpoint set note = overlay(note placing 'AAAA' from length(note) - 20) where size = 200",
        ),
        "a checkpoint after index 99: its signature does not hold",
    ),
    Mutation(
        "newest checkpoint deleted",
        (f"delete from pericarp.audit_checkpoint {NEWEST}",),
        "index 200 lies beyond",
        sequencer="the tree of 200 leaves is stored with 300",
    ),
    Mutation(
        "all checkpoints deleted",
        ("delete from pericarp.audit_checkpoint",),
        "",
        sequencer="the tree of 0 leaves is stored with 300",
    ),
    Mutation(
        "older checkpoint put in the newest's place",
        (
            f"update pericarp.audit_checkpoint set note = (select note from pericarp.audit_checkpoint where size = 200) {NEWEST}",
        ),
        "after 300 entries",
        sequencer="the tree of 200 leaves is stored with 300",
    ),
    Mutation(
        "waiting leaf deleted",
        (
            "delete from pericarp.audit_waiting where position = (select min(position) from pericarp.audit_waiting)",
        ),
        " is not in the tree",
        late=True,
    ),
    Mutation(
        "waiting leaf changed",
        (f"update pericarp.audit_waiting set envelope = {FLIP.format('envelope', 90)}",),
        "index 300: the body",
        late=True,
    ),
    Mutation(
        "waiting leaf that is none",
        (f"update pericarp.audit_waiting set envelope = {FLIP.format('envelope', 0)}",),
        "",
        sequencer="is no leaf",
        late=True,
    ),
)


async def fill(app_url: str, secrets_: Secrets) -> None:
    """The honest log, of two tenants."""
    database = Database(app_url)
    await database.open()
    try:
        directory = Directory(database, pepper=secrets_.pepper, master_key=secrets_.master_key)
        audit = Audit(database, master_key=secrets_.master_key)
        tenants = [(await directory.create_tenant(name)).id for name in NAMES]
        sequencer = Sequencer(database, SIGNER)
        for number in range(SIZE):
            await audit.record(entry_for(tenants[number % 2]))
            if number % STEP == STEP - 1:
                assert (await sequencer.step()).size == number + 1
    finally:
        await database.close()


@pytest.fixture(scope="module")
def honest(urls: Urls, installation_secrets: Secrets) -> Urls:
    asyncio.run(fill(urls.app_url, installation_secrets))
    return urls


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of the honest log, to be harmed."""

    urls: Urls
    superuser_url: str
    folder: Path

    def harm(self, *statements: str) -> None:
        asyncio.run(run_as_superuser(self.superuser_url, *DISARM, *statements))

    def step(self) -> None:
        """A sequencer starts on it, and integrates what waits."""
        asyncio.run(self._step())

    async def _step(self) -> None:
        database = Database(self.urls.app_url)
        await database.open()
        try:
            await Sequencer(database, SIGNER).step()
        finally:
            await database.close()

    def record(self, installation_secrets: Secrets, count: int) -> None:
        asyncio.run(self._record(installation_secrets, count))

    async def _record(self, kept: Secrets, count: int) -> None:
        database = Database(self.urls.app_url)
        await database.open()
        try:
            directory = Directory(database, pepper=kept.pepper, master_key=kept.master_key)
            tenant = await directory.find_tenant(NAMES[0])
            for _ in range(count):
                await Audit(database, master_key=kept.master_key).record(entry_for(tenant.id))
        finally:
            await database.close()

    def export(self, **options: object) -> Path:
        file = self.folder / f"export-{len(list(self.folder.iterdir()))}.jsonl"

        async def write() -> None:
            with file.open("wb") as out:
                async for line in export_log(self.urls.owner_url, **options):  # type: ignore[arg-type]
                    out.write(line)

        asyncio.run(write())
        return file

    def verify(self, *more: object, **options: object) -> subprocess.CompletedProcess[str]:
        return verify_export(self.export(**options), *more)

    def checkpoint(self, size: int) -> Path:
        """A checkpoint, as somebody keeps it."""
        file = self.folder / f"{size}.note"
        file.write_text(asyncio.run(self._note(size)))
        return file

    async def _note(self, size: int) -> str:
        connection = await asyncpg.connect(self.superuser_url)
        try:
            note: str = await connection.fetchval(
                "select note from pericarp.audit_checkpoint where size = $1", size
            )
            return note
        finally:
            await connection.close()


def verify_export(file: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", str(VERIFY), "export", str(file), "--key", SIGNER.key.text, *map(str, more)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


@pytest.fixture
def copy(honest: Urls, postgres_server: embedded.Server, tmp_path: Path) -> Iterator[Copy]:
    template = make_url(honest.app_url).database
    name = f"{template}_copy_{next(_copies)}"
    asyncio.run(
        run_as_superuser(
            postgres_server.superuser_url,
            f"create database {name} template {template} owner pericarp_owner",
            f"revoke all on database {name} from public",
            f"grant connect on database {name} to pericarp_app",
        )
    )
    yield Copy(
        Urls(with_database(honest.owner_url, name), with_database(honest.app_url, name)),
        with_database(postgres_server.superuser_url, name),
        tmp_path,
    )
    asyncio.run(run_as_superuser(postgres_server.superuser_url, f"drop database {name} with (force)"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name.replace(" ", "-"))
def test_every_mutation_is_found_and_named(
    copy: Copy, mutation: Mutation, installation_secrets: Secrets
) -> None:
    if mutation.late:
        copy.record(installation_secrets, 2)
    copy.harm(*mutation.statements)
    if mutation.sequencer:
        with pytest.raises(LogBroken, match=mutation.sequencer):
            copy.step()
    else:
        copy.step()
    if not mutation.verify:
        return
    done = copy.verify()
    assert done.returncode == 1, done.stdout
    assert mutation.verify in done.stderr


def test_no_receipt_is_handed_out_that_its_reader_would_refuse(copy: Copy) -> None:
    async def prove(index: int) -> Proof:
        connection = await asyncpg.connect(copy.superuser_url)
        row = await connection.fetchrow(
            "select tenant_id, id from pericarp.audit_leaf where index = $1", index
        )
        await connection.close()
        assert row is not None
        database = Database(copy.urls.app_url)
        await database.open()
        try:
            return await Proofs(database, SIGNER.key).prove(row["tenant_id"], str(row["id"]))
        finally:
            await database.close()

    assert asyncio.run(prove(VICTIM)).index == VICTIM
    copy.harm(EDIT_BODY, EDIT_HASH)
    with pytest.raises(LogBroken, match=f"leaf {VICTIM} is not in the tree of 300 leaves"):
        asyncio.run(prove(VICTIM))
    assert asyncio.run(prove(VICTIM + 1)).index == VICTIM + 1
    copy.harm("delete from pericarp.audit_tile where level = 0 and number = 0")
    with pytest.raises(LogBroken):
        asyncio.run(prove(VICTIM + 1))


def test_every_mutation_has_one_who_finds_it() -> None:
    assert all(mutation.verify or mutation.sequencer for mutation in MUTATIONS)
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_an_honest_log_is_found_whole(copy: Copy, installation_secrets: Secrets) -> None:
    old = [copy.checkpoint(size) for size in (100, 300)]
    copy.record(installation_secrets, 7)
    copy.step()
    done = copy.verify(*itertools.chain(*(("--checkpoint", each) for each in old)))
    assert done.returncode == 0, done.stderr
    assert "307 entries with their bodies, 0 leaves of others, 4 checkpoints" in done.stdout
    done = copy.verify(bodies=False)
    assert done.returncode == 0, done.stderr
    assert "307 entries, 0 leaves of others, 4 checkpoints" in done.stdout


def test_a_tenants_export_has_its_entries_and_others_hashes(copy: Copy) -> None:
    file = copy.export(tenant=NAMES[0])
    done = verify_export(file, "--checkpoint", copy.checkpoint(200))
    assert done.returncode == 0, done.stderr
    assert "150 entries with their bodies, 150 leaves of others, 3 checkpoints" in done.stdout
    other = asyncio.run(_tenant(copy, NAMES[1]))
    assert other not in file.read_text()
    copy.harm(EDIT_BODY)
    told = copy.verify(tenant=NAMES[VICTIM % 2])
    assert told.returncode == 1 and f"index {VICTIM}: the body" in told.stderr
    assert copy.verify(tenant=NAMES[1 - VICTIM % 2]).returncode == 0


async def _tenant(copy: Copy, name: str) -> str:
    connection = await asyncpg.connect(copy.superuser_url)
    try:
        return str(await connection.fetchval("select id from pericarp.tenant where name = $1", name))
    finally:
        await connection.close()


ROLL_BACK = (
    "delete from pericarp.audit_inbox i using pericarp.audit_leaf l"
    " where l.index >= 200 and (i.tenant_id, i.id) = (l.tenant_id, l.id)",
    "delete from pericarp.audit_leaf where index >= 200",
    "delete from pericarp.audit_checkpoint where size > 200",
    "delete from pericarp.audit_tile where level = 1 or number = 1",
    f"update pericarp.audit_tile set hashes = substring(hashes from 1 for {200 * 32})",
)


def test_a_log_that_was_rolled_back_is_found_by_who_has_seen_more(copy: Copy) -> None:
    """An older database is whole in itself: it takes a checkpoint, or a memory, from outside."""
    kept = copy.checkpoint(300)

    async def watch() -> None:
        database = Database(copy.urls.app_url)
        await database.open()
        try:
            sequencer = Sequencer(database, SIGNER)
            await sequencer.step()
            await run_as_superuser(copy.superuser_url, *DISARM, *ROLL_BACK)
            with pytest.raises(LogBroken, match="had 300 leaves and has 200"):
                await sequencer.step()
        finally:
            await database.close()

    asyncio.run(watch())
    assert copy.verify().returncode == 0
    done = copy.verify("--checkpoint", kept)
    assert done.returncode == 1 and "entries are missing" in done.stderr


async def forge(copy: Copy) -> None:
    """Somebody with the log's own key changes an entry, and makes leaf, tiles and every checkpoint fit again."""
    connection = await asyncpg.connect(copy.superuser_url)
    try:
        for statement in (*DISARM, EDIT_BODY, EDIT_HASH):
            await connection.execute(statement)
        leaves = [
            merkle.hash_leaf(row["envelope"])
            for row in await connection.fetch("select envelope from pericarp.audit_leaf order by index")
        ]
        tiles = merkle.grow(0, leaves, lambda level, number: b"")
        for (level, number), hashes in tiles.items():
            await connection.execute(
                "update pericarp.audit_tile set hashes = $3 where level = $1 and number = $2",
                level,
                number,
                hashes,
            )
        for size in (100, 200, 300):
            root = merkle.root(size, lambda level, number: tiles[level, number])
            await connection.execute(
                "update pericarp.audit_checkpoint set root = $2, note = $3 where size = $1",
                size,
                root,
                SIGNER.sign(Checkpoint(SIGNER.key.name, size, root)),
            )
    finally:
        await connection.close()


def test_a_forger_with_the_logs_own_key_is_found_by_who_has_kept_a_checkpoint(copy: Copy) -> None:
    kept = [copy.checkpoint(size) for size in (100, 200, 300)]

    async def watch() -> None:
        database = Database(copy.urls.app_url)
        await database.open()
        try:
            sequencer = Sequencer(database, SIGNER)
            await sequencer.step()
            await forge(copy)
            with pytest.raises(LogBroken, match="does not begin with"):
                await sequencer.step()
        finally:
            await database.close()

    asyncio.run(watch())
    assert copy.verify().returncode == 0
    for file, found in zip(kept, (False, True, True), strict=True):
        done = copy.verify("--checkpoint", file)
        assert done.returncode == found, done.stderr
        assert ("is not what it was" in done.stderr) == found


def test_an_export_that_was_changed_on_its_way_is_refused(copy: Copy) -> None:
    lines = copy.export().read_bytes().splitlines(keepends=True)

    def refused(changed: Sequence[bytes]) -> str:
        file = copy.folder / "changed.jsonl"
        file.write_bytes(b"".join(changed))
        done = verify_export(file)
        assert done.returncode in (1, 2), done.stdout
        return done.stderr

    entry = next(at for at, line in enumerate(lines) if b'"index":50,' in line)
    assert "index 50 is missing" in refused(lines[:entry] + lines[entry + 1 :])
    assert "index 51 is missing" in refused(lines[: entry + 1] + lines[entry:])
    assert "index 50 is missing" in refused(lines[:entry])
    assert "checkpoint of the tree of 300 entries is missing" in refused(
        [line for line in lines if b'"checkpoint"' not in line]
    )
    assert "cannot be read" in refused([*lines[:entry], b"{]\n"])
    assert "no first line" in refused(lines[:0])
    assert "Cannot be read" in refused(lines[1:])


def test_a_log_without_a_leaf_has_no_export(postgres_server: embedded.Server, template: Urls) -> None:
    name = f"empty_{secrets.token_hex(4)}"
    asyncio.run(
        run_as_superuser(
            postgres_server.superuser_url,
            f"create database {name} template {make_url(template.app_url).database} owner pericarp_owner",
        )
    )

    async def export() -> None:
        with pytest.raises(ReceiptPending):
            async for _ in export_log(with_database(template.owner_url, name)):
                pass

    asyncio.run(export())
