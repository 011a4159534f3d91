"""A gateway and witnesses that lie, refuse or are slow; and what the database keeps of those that do not."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import asyncpg
import pytest

from service.cosigning import Cosigning
from service.known_witnesses import KnownWitness, read_witnesses
from service.settings import Settings
from service.watch import metrics
from service.witness.judge import Answer, Judge
from service.witness.store import Store
from tenants.access import Caller
from tenants.audit import Audit
from tenants.checkpoint import Checkpoint, Cosigner, Signer, Submission, open_checkpoint, split_note
from tenants.cosignatures import Cosignatures
from tenants.database import Database
from tenants.errors import LogBroken
from tenants.proofs import Proofs
from tenants.sequencer import Sequencer, log_signer
from tests.integration.conftest import MakeCaller, run_as_superuser
from tests.integration.test_audit import entry_for

SEED = secrets.token_bytes(32)
Lie = Callable[[str], Answer | bytes]
"""Of a request's body: the answer, or bytes that are sent as they are."""


@dataclass
class Liar:
    """A server that says whatever it is told to, under a witness's key."""

    server: ThreadingHTTPServer
    cosigner: Cosigner
    lie: Lie
    asked: int = 0

    @property
    def known(self) -> KnownWitness:
        return KnownWitness(f"http://127.0.0.1:{self.server.server_port}", self.cosigner.key)


@pytest.fixture
def liar() -> Iterator[Liar]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            told.asked += 1
            answer = told.lie(body)
            if isinstance(answer, bytes):
                self.wfile.write(answer)
                self.close_connection = True
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.media_type)
            self.send_header("Content-Length", str(len(answer.body.encode())))
            self.end_headers()
            self.wfile.write(answer.body.encode())

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told = Liar(server, Cosigner("witness.example", secrets.token_bytes(32)), lambda _body: b"")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def signer() -> Signer:
    """One key for all tests of this module: they share a log."""
    return log_signer(SEED)


@pytest.fixture
def cosignatures(database: Database, signer: Signer) -> Cosignatures:
    return Cosignatures(database, signer.key)


@pytest.fixture
async def plain(superuser_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """The superuser, who sees everything, and changes it."""
    connection = await asyncpg.connect(superuser_url)
    yield connection
    await connection.close()


@dataclass
class Log:
    """Grows when it is told to."""

    audit: Audit
    sequencer: Sequencer
    caller: Caller

    async def grow(self, count: int = 1) -> str:
        """The last entry's id."""
        for _ in range(count):
            last = await self.audit.record(entry_for(self.caller.tenant))
        while (await self.sequencer.step()).integrated:
            pass
        return str(last)


@pytest.fixture
async def grown(
    audit: Audit, database: Database, signer: Signer, make_caller: MakeCaller, superuser_url: str
) -> Log:
    """With some leaves, and no cosignature yet."""
    await run_as_superuser(
        superuser_url,
        "alter table pericarp.audit_cosignature disable trigger all",
        "delete from pericarp.audit_cosignature",
        "delete from pericarp.audit_witness",
        "alter table pericarp.audit_cosignature enable always trigger audit_cosignature_append_only",
    )
    log = Log(audit, Sequencer(database, signer), await make_caller())
    await log.grow(3)
    return log


@asynccontextmanager
async def asking(cosignatures: Cosignatures, *witnesses: KnownWitness) -> AsyncIterator[Cosigning]:
    """A gateway's task that asks these witnesses."""
    cosigning = Cosigning(cosignatures, witnesses)
    task = asyncio.create_task(cosigning.keep())
    try:
        yield cosigning
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenants.cosignatures.CLAIMED_S", 0.0)
    monkeypatch.setattr("service.cosigning.LOOK_EVERY_S", 0.02)


def of(liar: Liar, body: str, change: Callable[[Checkpoint], Checkpoint] = lambda each: each) -> str:
    """The liar's cosignature, on what was submitted or on something else."""
    text, _ = split_note(Submission.parse(body).note)
    return liar.cosigner.cosign(change(Checkpoint.parse(text)), at_s=1)


STRANGER = Cosigner("witness.example", bytes(32))
LIES: dict[str, tuple[Callable[[Liar], Lie], str]] = {
    "a cosignature on a larger tree": (
        lambda liar: (
            lambda body: Answer(200, of(liar, body, lambda c: Checkpoint(c.origin, c.size + 1, c.root)))
        ),
        "refused",
    ),
    "a cosignature by another key": (
        lambda _: (
            lambda body: Answer(
                200, STRANGER.cosign(Checkpoint.parse(split_note(Submission.parse(body).note)[0]), at_s=1)
            )
        ),
        "refused",
    ),
    "a cosignature without its end": (lambda liar: lambda body: Answer(200, of(liar, body)[:-1]), "refused"),
    "nothing": (lambda _: lambda _body: Answer(200, ""), "refused"),
    "what is no signature": (lambda _: lambda _body: Answer(200, "<html>\n"), "refused"),
    "an error": (lambda _: lambda _body: Answer(500, ""), "refused"),
    "elsewhere": (lambda _: lambda _body: Answer(302, ""), "refused"),
    "an unknown log": (lambda _: lambda _body: Answer(404, ""), "refused"),
    "a key that it does not trust": (lambda _: lambda _body: Answer(403, ""), "refused"),
    "a conflict without a size": (lambda _: lambda _body: Answer(409, "two\n"), "refused"),
    "another size each time": (
        lambda _: lambda body: Answer(409, f"{1 - min(1, Submission.parse(body).old)}\n"),
        "refused",
    ),
    "an answer without an end": (lambda _: lambda _body: Answer(200, "x" * 100_000), "refused"),
    "bytes that are no text": (
        lambda _: lambda _body: b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xff",
        "refused",
    ),
    "what is not HTTP": (lambda _: lambda _body: b"SSH-2.0-OpenSSH_9.2\r\n", "away"),
    "a broken connection": (lambda _: lambda _body: b"", "away"),
    "a larger tree than there is": (lambda _: lambda _body: Answer(409, "1000000\n"), "inconsistent"),
    "that the proof does not hold": (lambda _: lambda _body: Answer(422, ""), "inconsistent"),
    "that it has another tree of that size": (
        lambda _: lambda body: Answer(409, f"{split_note(Submission.parse(body).note)[0].split()[1]}\n"),
        "inconsistent",
    ),
}


def failed(state: str) -> float:
    name = "pericarp_log_cosigning_failures_total"
    return metrics.REGISTRY.get_sample_value(name, {"reason": state}) or 0.0


@pytest.mark.parametrize(("make", "state"), LIES.values(), ids=[name.replace(" ", "-") for name in LIES])
async def test_a_witness_that_says_anything_but_its_cosignature_is_told_and_no_receipt_waits(
    liar: Liar,
    make: Callable[[Liar], Lie],
    state: str,
    cosignatures: Cosignatures,
    grown: Log,
    database: Database,
    signer: Signer,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    liar.lie = make(liar)
    before = failed(state)
    async with asking(cosignatures, liar.known) as cosigning:
        assert cosigning.standing == {"witness.example": "not asked yet"}
        await until(lambda: failed(state) >= before + 2)  # and it is asked again
        assert cosigning.standing == {"witness.example": state}
        entry = await grown.grow()
        proof = await Proofs(database, signer.key).prove(grown.caller.tenant, entry)
        assert "witness.example" not in proof.note
        stored = "select count(*) from pericarp.audit_cosignature where witness = $1"
        assert await plain.fetchval(stored, liar.known.key.text) == 0
        liar.lie = lambda body: Answer(200, of(liar, body))
        await until(lambda: cosigning.standing == {"witness.example": "ok"})
    assert await plain.fetchval(stored, liar.known.key.text) == 1


async def test_a_witness_that_never_answers_keeps_no_other_waiting(
    liar: Liar, monkeypatch: pytest.MonkeyPatch, cosignatures: Cosignatures, grown: Log
) -> None:
    monkeypatch.setattr("service.cosigning.ANSWER_S", 0.5)
    silent, over = Cosigner("silent.example", secrets.token_bytes(32)), threading.Event()

    def answer(body: str) -> Answer | bytes:
        if first.is_set():
            return Answer(200, of(liar, body))
        first.set()
        over.wait(60)
        return b""

    first = threading.Event()
    liar.lie = answer
    try:
        async with asking(cosignatures, KnownWitness(liar.known.url, silent.key)) as waiting:
            await until(first.is_set)
            async with asking(cosignatures, liar.known) as cosigning:
                await until(lambda: cosigning.standing["witness.example"] == "ok")
            await until(lambda: waiting.standing["silent.example"] in ("away", "refused"))
    finally:
        over.set()


async def test_receipts_and_auditors_get_what_most_witnesses_have_cosigned(
    liar: Liar, tmp_path: Path, cosignatures: Cosignatures, grown: Log, database: Database, signer: Signer
) -> None:
    """Two witnesses on one server: one honest, judged by the real thing, and one that goes away."""
    proofs = Proofs(database, signer.key)
    store = Store(tmp_path / "folder")
    store.add_log(signer.key)
    judge = Judge(store)
    honest = KnownWitness(liar.known.url, store.cosigner.key)

    def answer(body: str) -> Answer:
        judged = judge.add_checkpoint(body.encode())
        return Answer(200, judged.body + of(liar, body)) if judged.status == 200 else judged

    liar.lie = answer
    keys = [signer.key, liar.cosigner.key, store.cosigner.key]
    entry = await grown.grow()
    async with asking(cosignatures, liar.known) as cosigning:
        await until(lambda: cosigning.standing["witness.example"] == "ok")
    async with asking(cosignatures, honest) as cosigning:
        await until(lambda: cosigning.standing[store.cosigner.key.name] == "ok")
    both = await proofs.checkpoint()
    assert set(open_checkpoint(both, keys, origin=signer.key.name).signers) == set(keys)
    await grown.grow()
    async with asking(cosignatures, honest) as cosigning:
        await until(lambda: cosigning.standing[store.cosigner.key.name] == "ok")
    newer = await grown.grow()
    assert await proofs.checkpoint() == both
    assert (await proofs.prove(grown.caller.tenant, entry)).note == both
    alone = (await proofs.prove(grown.caller.tenant, newer)).note  # only the newest tree has it
    assert open_checkpoint(alone, keys).signers == (signer.key,)


async def test_a_checkpoint_that_nobody_cosigned_lately_gives_way_to_the_newest(
    liar: Liar,
    cosignatures: Cosignatures,
    grown: Log,
    database: Database,
    signer: Signer,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    proofs = Proofs(database, signer.key)
    liar.lie = lambda body: Answer(200, of(liar, body))
    async with asking(cosignatures, liar.known) as cosigning:
        await until(lambda: cosigning.standing["witness.example"] == "ok")
    seen = await proofs.checkpoint()
    await grown.grow()
    assert await proofs.checkpoint() == seen
    await plain.execute("alter table pericarp.audit_checkpoint disable trigger all")
    await plain.execute(
        "update pericarp.audit_checkpoint set recorded_at = recorded_at + interval '2 minutes'"
        " where size = (select max(size) from pericarp.audit_checkpoint)"
    )
    newest = open_checkpoint(await proofs.checkpoint(), [signer.key, liar.cosigner.key])
    assert newest.signers == (signer.key,)
    assert newest.checkpoint.size > open_checkpoint(seen, [signer.key]).checkpoint.size


@pytest.mark.parametrize(
    "change",
    [
        "line = overlay(line placing 'AAAA' from length(line) - 20)",
        "line = left(line, -1)",
        "line = ''",
        "witness = 'nobody'",
        "witness = replace(witness, 'example', 'ample')",
    ],
)
async def test_a_stored_cosignature_that_was_changed_is_not_handed_out(
    liar: Liar,
    change: str,
    cosignatures: Cosignatures,
    grown: Log,
    database: Database,
    signer: Signer,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    proofs = Proofs(database, signer.key)
    entry = await grown.grow()
    liar.lie = lambda body: Answer(200, of(liar, body))
    async with asking(cosignatures, liar.known) as cosigning:
        await until(lambda: cosigning.standing["witness.example"] == "ok")
    assert "witness.example" in await proofs.checkpoint()
    await plain.execute("alter table pericarp.audit_cosignature disable trigger all")
    await plain.execute(
        f"update pericarp.audit_cosignature set {change} where witness = $1", liar.known.key.text
    )
    with pytest.raises(LogBroken, match="a stored cosignature does not hold"):
        await proofs.checkpoint()
    with pytest.raises(LogBroken):
        await proofs.prove(grown.caller.tenant, entry)


async def test_of_any_number_of_gateways_one_asks_a_witness_at_a_time(
    liar: Liar,
    monkeypatch: pytest.MonkeyPatch,
    cosignatures: Cosignatures,
    grown: Log,
    plain: asyncpg.Connection[asyncpg.Record],
) -> None:
    monkeypatch.setattr("tenants.cosignatures.CLAIMED_S", 60.0)
    await grown.grow()
    turns = await asyncio.gather(*(cosignatures.claim(liar.known.key) for _ in range(20)))
    assert sum(turn.claimed for turn in turns) == 1
    other = Cosigner("other.example", bytes(32)).key
    assert (await cosignatures.claim(other)).claimed, "each witness by itself"
    for away in (
        "+ interval '1 hour'",
        "- interval '61 seconds'",
    ):  # a clock that jumped; a gateway that died
        await plain.execute(f"update pericarp.audit_witness set claimed_at = clock_timestamp() {away}")
        assert (await cosignatures.claim(liar.known.key)).claimed
        assert not (await cosignatures.claim(liar.known.key)).claimed


async def test_nothing_is_asked_where_nothing_is_new_or_nothing_is_there(
    liar: Liar, cosignatures: Cosignatures, grown: Log, signer: Signer
) -> None:
    liar.lie = lambda body: Answer(200, of(liar, body))
    async with asking(cosignatures, liar.known) as cosigning:
        await until(lambda: cosigning.standing["witness.example"] == "ok")
        asked = liar.asked
        await asyncio.sleep(0.3)
        assert liar.asked == asked
        await grown.grow()
        await until(lambda: liar.asked > asked)
        async with asyncio.timeout(30):
            while (turn := await cosignatures.claim(liar.known.key)).cosigned != turn.newest:
                await asyncio.sleep(0.02)
    assert not turn.claimed
    stranger = Cosignatures(cosignatures._database, Signer(signer.key.name, bytes(32)).key)
    with pytest.raises(LogBroken):
        await stranger.submission(0)


WITNESS = Cosigner("witness.example", bytes(32)).key.text


def test_witnesses_are_read_from_the_setting() -> None:
    other = Cosigner("other.example", bytes(32)).key.text
    settings = Settings(witnesses=f" http://[::1]:8081={WITNESS} , https://w.example/w/={other}")
    first, second = read_witnesses(settings.witnesses)
    assert (first.url, first.key.text) == ("http://[::1]:8081", WITNESS)
    assert (second.url, second.key.text) == ("https://w.example/w", other)


@pytest.mark.parametrize(
    "text",
    [
        WITNESS,
        f"={WITNESS}",
        f"ftp://w.example={WITNESS}",
        f"http://={WITNESS}",
        f"http://me@w.example={WITNESS}",
        f"http://w.example/?a={WITNESS}",
        f"http://w.example={Signer('log.example', bytes(32)).key.text}",
        "http://w.example=",
        f"http://w.example={WITNESS},http://v.example={WITNESS}",
    ],
)
def test_what_is_no_witness_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="witness"):
        Settings(witnesses=text)
