"""Workers of a GPU score with one copy of the weights, and its owner is started, watched, replaced and outlives them.

Owner, workers, wire and sandbox are the real ones. The GPU is the stub of `tests/cuda_stub.py`, whose memory is files:
so a test can look into it. Most workers are puppets that can tamper with it, as one could that was taken over.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from models import Item, Job
from service.fleet.local import LocalFleet
from service.fleet.ownership import Ownership, may_lend
from service.fleet.starts import FIRST_UID, Starts, worker_launch
from tests.cuda_stub import COMPILER, build, memories
from tests.integration.fleet_conformance import ACME, BETA, job, until
from tests.integration.test_fleet import FAKE, alive, spares
from tests.tiny_qwen import save_checkpoint

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build the CUDA stub with")

JOB = Job(Item("red shoe"), (Item("a red shoe"), Item("something else")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is the GPU's memory; children find the stub there."""
    build(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    return tmp_path


Start = Callable[..., Any]


@pytest.fixture
def start(checkpoint: Path, gpu: Path) -> Start:
    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[LocalFleet]:
        given = {"model": str(checkpoint), "device": "cuda", "dtype": "fp32", "spare_workers": 0}
        modules = {"worker": "tests.integration.cuda_puppet", "owner": "tests.integration.cuda_owner"}
        fleet = LocalFleet(**{**given, **modules, "max_workers": 2, **settings})
        await fleet.start()
        try:
            yield fleet
        finally:
            pids = [*(state.pid for state in fleet.workers()), *owners()]
            await fleet.close()
            assert not [pid for pid in pids if alive(pid)]

    return start


def owners() -> list[int]:
    """Live owners that this process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            head, _, rest = stat.rpartition(")")
            state, parent = rest.split()[:2]
            if "prc-weights" in head and parent == str(os.getpid()) and state != "Z":
                found.append(int(entry.name))
    return found


async def ask(fleet: LocalFleet, command: str = "peek 4096", tenant: str = ACME) -> float:
    return (await fleet.score(tenant, job(command, "a"), deadline_s=200)).scores.margins[0]


def the_worker(fleet: LocalFleet) -> int:
    (state,) = fleet.workers()
    return state.pid


def actions(logs: list[Any]) -> list[str]:
    return [line["action"] for line in logs]


async def test_two_tenants_workers_map_one_copy_and_score_as_with_their_own(start: Start, gpu: Path) -> None:
    async def margins(fleet: LocalFleet, tenant: str) -> tuple[float, ...]:
        return (await fleet.score(tenant, JOB, deadline_s=250)).scores.margins

    async with start(worker="tests.integration.cuda_worker") as fleet:
        scored = [await margins(fleet, tenant) for tenant in (ACME, BETA)]
        (memory,) = memories(gpu)
        assert fleet.card is not None and (fleet.card.weights, fleet.card.unlent) == ("lent", None)
        assert fleet.lent.size_bytes == memory.stat().st_size and fleet.lent.workers == 2
        if os.geteuid() == 0:
            (owner,) = owners()
            for pid in (owner, *(state.pid for state in fleet.workers())):
                assert {line.split()[4] for line in mappings(pid, str(memory))} == {str(memory.stat().st_ino)}
                files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
                assert not any("memfd" in file for file in files), "nobody keeps the offer"
                assert memory.name not in Path(f"/proc/{pid}/cmdline").read_text()
            status = Path(f"/proc/{owner}/status").read_text()
            assert "\nUid:\t6" in status and "\nNoNewPrivs:\t1" in status
    assert not owners()
    async with start(worker="tests.integration.cuda_worker", share_weights=False) as fleet:
        assert await margins(fleet, ACME) == scored[0] == scored[1]
        assert fleet.card is not None and fleet.card.weights == "own"
        assert fleet.lent.size_bytes == 0 and not owners() and memories(gpu) == [memory]


def mappings(pid: int, of: str) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith(of)]


async def test_changed_weights_end_their_workers_and_a_new_owner_lends_them_anew(
    start: Start, gpu: Path
) -> None:
    async with start(weights_check_s=0.2, spare_workers=1) as fleet:
        before = await ask(fleet)
        await until(lambda: fleet.lent.checks >= 2 and len(fleet.workers()) == 2, within_s=60)
        assert fleet.lent.changes == 0, "as long as nobody touches them"
        workers, (owner,) = {state.pid for state in fleet.workers()}, owners()
        with capture_logs() as logs:
            busy = asyncio.create_task(ask(fleet, "sleep 15"))
            await until(lambda: any(state.busy for state in fleet.workers()))
            assert await ask(fleet, "poke 4096") != before
            await until(lambda: fleet.lent.changes == 1)
            await until(lambda: not any(map(alive, workers)))
            assert await ask(fleet) == before
            busy.cancel()
            assert len(memories(gpu)) == 2 and owners() != [owner] and len(owners()) == 1
        (line,) = (line for line in logs if line["action"] == "weights_changed")
        assert (line["log_level"], line["pid"], line["workers"]) == ("critical", owner, 2)
        assert actions(logs).index("weights_changed") < actions(logs).index("weights_lent")


async def test_an_owner_outlives_its_workers_and_its_successor_waits_for_that(
    checkpoint: Path, gpu: Path
) -> None:
    """A worker that is slow to die still maps the memory: it must stay, and the GPU must not hold the weights twice."""
    changed = asyncio.Event()
    launch = worker_launch(
        worker=FAKE,
        model=str(checkpoint),
        device="cuda",
        dtype="fp32",
        threads=1,
        offline=True,
        start_s=120.0,
        silence_s=10.0,
        told=print,
    )
    starts = Starts(launch, first_uid=FIRST_UID)
    ownership = Ownership(starts, owner="tests.integration.cuda_owner", check_s=0.1, changed=changed.set)

    async def advance(until: Callable[[], bool]) -> None:
        async with asyncio.timeout(100):
            while not until():
                ownership.advance(time.monotonic())
                await changed.wait()
                changed.clear()

    try:
        assert not ownership.settled
        await advance(lambda: ownership.settled)
        workers = [ownership.begin()[1] for _ in range(2)]
        starts.forget()
        (first,) = owners()
        with memories(gpu)[0].open("r+b") as memory:
            memory.write(b"tampered")
        await advance(lambda: ownership.state.changes == 1)
        for worker in workers:
            for _ in range(20):
                ownership.advance(time.monotonic())
                await asyncio.sleep(0)
            assert not ownership.settled and owners() == [first] and len(memories(gpu)) == 1
            assert ownership.begin()[1] is None, "nobody borrows from it any more"
            starts.forget()
            ownership.give_back(worker)
        ownership.advance(time.monotonic())
        await advance(lambda: not owners())
        assert len(memories(gpu)) == 1
        await advance(lambda: ownership.settled)
        assert owners() != [first] and len(memories(gpu)) == 2
    finally:
        await ownership.close()
    assert not owners()


async def test_when_the_owner_dies_its_workers_go_and_their_jobs_are_answered(
    start: Start, gpu: Path
) -> None:
    async with start() as fleet:
        before = await ask(fleet)
        worker, (owner,) = the_worker(fleet), owners()
        with capture_logs() as logs:
            busy = asyncio.create_task(ask(fleet, "sleep 1"))
            await until(lambda: any(state.busy for state in fleet.workers()))
            os.kill(owner, signal.SIGKILL)
            await until(lambda: not alive(worker))
            await busy
            assert await ask(fleet) == before
        (line,) = (line for line in logs if line["action"] == "weights_lost")
        assert (line["pid"], line["workers"]) == (owner, 1)
        assert len(memories(gpu)) == 2 and owners() != [owner]
        assert fleet.ready and fleet.reason is None


async def test_an_owner_that_dies_while_a_worker_starts_is_replaced_with_it(start: Start, gpu: Path) -> None:
    async with start() as fleet:
        answer = asyncio.create_task(ask(fleet))
        await until(lambda: fleet.lent.workers == 1, within_s=100)
        assert not fleet.workers()
        (owner,) = owners()
        os.kill(owner, signal.SIGKILL)
        await answer
        await until(lambda: fleet.lent.workers == 1 and len(fleet.workers()) == 1, within_s=100)
        assert await ask(fleet) == await answer
        assert owners() != [owner] and fleet.lent.workers == 1
        assert fleet.card is not None and fleet.card.weights == "lent"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("no-export", "cudaIpcGetMemHandle: operation not supported (801)"),
        ("no-open", "cudaIpcOpenMemHandle: mapping of buffer object failed (205)"),
    ],
)
async def test_where_memory_cannot_be_shared_workers_have_copies_of_their_own(
    start: Start, gpu: Path, trouble: str, reason: str
) -> None:
    (gpu / trouble).touch()
    with capture_logs() as logs:
        async with start() as fleet:
            for tenant in (ACME, BETA):
                await ask(fleet, "length", tenant)
            assert fleet.ready and fleet.reason is None
            assert fleet.card is not None and fleet.card.weights == "own"
            assert fleet.lent.size_bytes == fleet.lent.workers == 0
            await until(lambda: not owners())
    (line,) = (line for line in logs if line["action"] == "weights_own")
    assert (line["log_level"], line["reason"]) == ("warning", reason)


async def test_an_owner_that_finds_no_room_is_tried_twice_and_then_done_without(
    start: Start, gpu: Path
) -> None:
    (gpu / "no-room").touch()
    with capture_logs() as logs:
        async with start() as fleet:
            await until(lambda: fleet.ready, within_s=200)
            await ask(fleet, "length")
            assert not owners()
    assert [action for action in actions(logs) if "weights" in action] == [
        *("weights_lost", "weights_lost", "weights_own")
    ]


async def test_a_room_that_was_full_for_a_moment_is_tried_again(start: Start, gpu: Path) -> None:
    (gpu / "no-room").touch()
    async with start() as fleet:
        await until(lambda: fleet.reason is not None and "no room" in fleet.reason, within_s=100)
        (gpu / "no-room").unlink()
        await ask(fleet)
        assert fleet.lent.workers == 1


async def test_closing_while_the_owner_starts_leaves_nothing(start: Start) -> None:
    async with start() as fleet:
        await until(owners, within_s=60)
    assert not owners()
    async with start() as fleet:
        await asyncio.sleep(0.05)
        assert not fleet.workers()


async def test_without_a_gpu_there_is_no_owner(gpu: Path) -> None:
    """`auto` on this machine, and `cpu`: workers start at once, as ever."""
    fleet = LocalFleet(model="puppet", worker=FAKE, device="cpu", owner="no.such.module")
    await fleet.start()
    try:
        await until(lambda: spares(fleet))
        assert not owners() and fleet.lent.size_bytes == 0
    finally:
        await fleet.close()


def test_who_may_have_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("service.fleet.ownership.NVIDIA_DEVICES", (str(tmp_path / "nvidiactl"),))
    assert [may_lend(device) for device in ("cpu", "auto", "cuda", "cuda:1")] == [False, False, True, True]
    (tmp_path / "nvidiactl").touch()
    assert [may_lend(device) for device in ("cpu", "auto")] == [False, True]
