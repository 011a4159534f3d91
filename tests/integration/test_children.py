"""The life of a child process, on both event loops that the gateway may run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from models import Item, Job, Pixels
from service.fleet.messages import SCORING, ScoreReply, ScoreRequest
from service.processes.children import Child, ChildLost, Launch, bare_environ, start_child
from service.processes.wire import WireError

Run = Callable[[Coroutine[Any, Any, None]], None]

CHILD = """
import os, signal, sys, time
from models import Scores
from service.fleet.messages import SCORING, ScoreReply
from service.processes.parent import Parent
from service.processes.wire import Hello
parent = Parent(int(sys.argv[1]), int(sys.argv[2]), SCORING)
parent.send(Hello(os.getpid()))
while True:
    request = parent.receive()
    command, _, argument = request.job.query.text.partition(" ")
    if command == "sleep":
        time.sleep(float(argument))
    if command == "exit":
        os._exit(int(argument))
    if command == "hello":
        parent.send(Hello(os.getpid()))
    if command == "garbage":
        os.write(int(sys.argv[1]), b"x" * 100)
    if command == "shout":
        os.write(2, b"y" * 3_000_000 + b"\\nlast words\\n")
    names = [float(len(os.environ)), float(os.getsid(0) == os.getpid())]
    parent.send(ScoreReply(request.id, Scores(tuple(names), 1, 1, len(request.job.candidates)), 0.0))
"""


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


def launch(code: str = CHILD, **settings: Any) -> Launch:
    return Launch((sys.executable, "-P", "-c", code, "{fd}", "{parent}"), SCORING, bare_environ(), **settings)


def request(number: int, query: str = "q", *candidates: Item) -> ScoreRequest:
    return ScoreRequest(number, "t", Job(Item(query), candidates), 0.0)


def gone(pid: int) -> bool:
    """Ended and reaped."""
    return not Path(f"/proc/{pid}").exists()


async def lost_within(child: Child, seconds: float) -> str:
    async with asyncio.timeout(seconds):
        return await asyncio.shield(child.lost)


def test_a_child_greets_answers_and_ends_with_its_socket(run: Run) -> None:
    async def play() -> None:
        child = await start_child(launch())
        assert child.hello.pid == child.pid
        image = Item("c", Pixels(224, 224, bytes(224 * 224 * 3)))
        replies = await asyncio.gather(*(child.ask(request(n, "q", *(image,) * n)) for n in range(1, 9)))
        assert [reply.id for reply in replies] == list(range(1, 9))
        assert [reply.scores.computed_tokens for reply in replies] == list(range(1, 9))
        start_s = time.monotonic()
        await child.stop()
        assert time.monotonic() - start_s < 1
        assert gone(child.pid)
        with pytest.raises(ChildLost, match="stopped"):
            await child.ask(request(10))

    run(play())


def test_a_child_inherits_its_environment_its_socket_and_nothing_else(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERICARP_SECRET", "x")
    leaked = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leaked, True)

    async def play() -> None:
        child = await start_child(launch())
        reply = await child.ask(request(1))
        assert reply.scores.margins == (float(len(bare_environ())), 1.0)  # and a session of its own
        files = [os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{child.pid}/fd")]
        assert len(files) == 4
        assert files.count("/dev/null") == 2
        assert "/dev/zero" not in files
        await child.stop()

    run(play())
    os.close(leaked)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("exit 3", "closed its socket|exit status 3"),
        ("hello", "second Hello"),
        ("garbage", "version 120"),
    ],
)
def test_a_child_that_ends_or_talks_nonsense_is_lost_at_once(run: Run, command: str, reason: str) -> None:
    async def play() -> None:
        child = await start_child(launch())
        start_s = time.monotonic()
        with pytest.raises(ChildLost, match=reason):
            await child.ask(request(1, command))
        assert time.monotonic() - start_s < 0.5
        await child.stop()
        assert gone(child.pid)

    run(play())


def test_a_killed_child_fails_all_that_wait_for_it(run: Run) -> None:
    async def play() -> None:
        child = await start_child(launch())
        asked = [asyncio.create_task(child.ask(request(n, "sleep 9"))) for n in (1, 2)]
        await asyncio.sleep(0.1)
        os.kill(child.pid, signal.SIGKILL)
        start_s = time.monotonic()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - start_s < 0.5
        assert all(isinstance(result, ChildLost) for result in results)
        await child.stop()
        assert gone(child.pid)

    run(play())


def test_a_child_that_stands_still_is_killed_even_while_a_large_request_is_being_sent() -> None:
    async def play() -> None:
        child = await start_child(launch(silence_s=2.0))
        await asyncio.sleep(2.5)  # beats keep it alive
        assert child.alive
        os.kill(child.pid, signal.SIGSTOP)
        image = Item("c", Pixels(1000, 1000, bytes(3_000_000)))
        with pytest.raises(ChildLost, match="silent for 2 s"):
            async with asyncio.timeout(5):
                await child.ask(request(1, "q", image))
        await child.stop()
        assert gone(child.pid)

    uvloop.run(play())


def test_a_child_at_work_beats_and_a_late_answer_is_dropped() -> None:
    async def play() -> None:
        child = await start_child(launch(silence_s=2.0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await child.ask(request(1, "sleep 2.6"))
        reply = await child.ask(request(2))
        assert isinstance(reply, ScoreReply) and reply.id == 2
        await child.stop()

    uvloop.run(play())


def test_a_busy_child_that_does_not_go_is_killed_after_the_grace(run: Run) -> None:
    async def play() -> None:
        child = await start_child(launch(grace_s=0.3))
        asked = asyncio.create_task(child.ask(request(1, "sleep 30")))
        await asyncio.sleep(0.1)
        start_s = time.monotonic()
        await child.stop()
        assert time.monotonic() - start_s < 1.5
        assert gone(child.pid)
        with pytest.raises(ChildLost):
            await asked

    run(play())


def test_what_a_child_shouts_is_bounded_and_does_not_block_it(run: Run) -> None:
    heard: list[str] = []

    async def play() -> None:
        child = await start_child(replace(launch(), told=heard.append))
        await child.ask(request(1, "shout"))
        await child.stop()
        await asyncio.sleep(0.1)

    run(play())
    assert heard[-1] == "last words"
    assert sum(map(len, heard)) < 2000


def test_a_child_that_does_not_start_says_why(run: Run) -> None:
    async def play() -> None:
        with pytest.raises(ChildLost, match="exit status 1; no such model"):
            await start_child(launch("import sys; sys.exit('no such model')"))
        with pytest.raises(ChildLost, match="signal 9"):
            await start_child(launch("import os; os.kill(os.getpid(), 9)"))
        with pytest.raises(ChildLost, match=r"not ready within 0.4 s"):
            await start_child(launch("import time; time.sleep(60)", start_s=0.4))
        with pytest.raises(ChildLost, match="cannot be started"):
            await start_child(replace(launch(), argv=("/no/such/program",)))

    run(play())


def test_cancelling_a_start_leaves_no_process(run: Run, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    async def play() -> None:
        task = asyncio.create_task(start_child(launch(code)))
        while not (note.exists() and note.read_text()):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gone(int(note.read_text()))

    run(play())


def test_what_cannot_be_sent_harms_nobody(run: Run) -> None:
    async def play() -> None:
        child = await start_child(launch())
        with pytest.raises(WireError):
            await child.ask(request(1, "\ud800"))
        assert (await child.ask(request(2))).id == 2
        await child.stop()

    run(play())


GATEWAY = """
import asyncio, os, signal, sys, structlog, uvloop
from service.fleet.local import LocalFleet
from models import Item, Job

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def main():
    fleet = LocalFleet(model="puppet", worker="tests.integration.fake_worker", silence_s=2.0)
    await fleet.start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = Job(Item("q"), (Item("a"),))
    print((await fleet.score("a", job, deadline_s=20)).worker, flush=True)
    while len(fleet.workers()) < 2:
        await asyncio.sleep(0.01)
    busy = asyncio.create_task(fleet.score("b", Job(Item("sleep 30"), ()), deadline_s=60))
    while len(fleet.workers()) < 3:
        await asyncio.sleep(0.01)
    print(*(worker.pid for worker in fleet.workers()), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print((await fleet.score("a", job, deadline_s=20)).worker, flush=True)

(uvloop if sys.argv[1] == "uvloop" else asyncio).run(main())
"""


@pytest.fixture(params=["asyncio", "uvloop"])
def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", GATEWAY, request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_child_outlives_a_gateway_that_is_killed(gateway: subprocess.Popen[str]) -> None:
    assert gateway.stdout is not None
    gateway.stdout.readline()
    pids = [int(pid) for pid in gateway.stdout.readline().split()]
    assert len(pids) == 3  # one idle, one in the middle of a job, one spare; as root, all under other users
    os.kill(pids[0], signal.SIGSTOP)
    gateway.kill()
    gateway.wait()
    end_s = time.monotonic() + 2
    while any(map(running, pids)):
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize("gateway", ["uvloop"], indirect=True)
def test_neither_ctrl_c_nor_a_pause_of_the_gateway_costs_a_worker(gateway: subprocess.Popen[str]) -> None:
    assert gateway.stdin is not None and gateway.stdout is not None
    worker = gateway.stdout.readline()
    pids = [int(pid) for pid in gateway.stdout.readline().split()]
    os.killpg(gateway.pid, signal.SIGINT)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    gateway.send_signal(signal.SIGSTOP)
    time.sleep(3)  # longer than its `silence_s`
    gateway.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    gateway.stdin.write("again\n")
    gateway.stdin.flush()
    assert gateway.stdout.readline() == worker
    assert all(map(running, pids))


def test_a_question_and_its_answer_are_quick(run: Run) -> None:
    async def play() -> None:
        child = await start_child(launch())
        times_ms = []
        for number in range(1, 30):
            start_s = time.perf_counter()
            await child.ask(request(number, "q" * 1000, Item("c")))
            times_ms.append((time.perf_counter() - start_s) * 1000)
        await child.stop()
        assert sorted(times_ms)[0] < 10  # some 0.3 ms on a quiet machine

    run(play())


CONFINED = """
import os, resource, sys
from service.processes.sandbox import Confinement, confine
uid = int(sys.argv[1]) if len(sys.argv) > 1 else None
for measure in confine(Confinement(uid, open_files=64, address_space_bytes=2**31, cpu_s=60)):
    print(measure.name, measure.held)
print(resource.getrlimit(resource.RLIMIT_NOFILE), os.getresuid(), os.getresgid(), os.getgroups())
print(*(line for line in open("/proc/self/status") if line.startswith(("NoNewPrivs", "CapEff", "CapPrm"))))
"""


def confined(*arguments: str) -> str:
    command = [sys.executable, "-c", CONFINED, *arguments]
    return subprocess.run(command, env=bare_environ(), capture_output=True, text=True, check=True).stdout


def test_confinement_reports_what_the_kernel_says() -> None:
    report = confined()
    for name in ("core", "open_files", "address_space", "cpu", "no_new_privs", "not_dumpable"):
        assert f"{name} True" in report
    assert "(64, 64)" in report
    assert "NoNewPrivs:\t1" in report


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop root")
def test_a_dropped_user_keeps_nothing_of_root() -> None:
    report = confined("61999")
    assert "uid True" in report
    assert "(61999, 61999, 61999) (61999, 61999, 61999) []" in report
    assert "CapEff:\t0000000000000000" in report and "CapPrm:\t0000000000000000" in report
    assert "uid False" in confined("0")  # root is no user to drop to
