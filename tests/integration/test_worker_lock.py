"""The lock of workers from inside: what a model that was taken over can still do."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from models import Item, Job
from service.fleet.messages import Assign, ScoreReply, ScoreRequest
from service.fleet.starts import FIRST_UID, Starts, worker_launch
from service.processes.children import FORBIDDEN_CALL, Child, ChildLost, start_child
from service.processes.wire import Failure
from tests.integration.test_lock import LOCK, status

DONE = {"a thread", "randomness", "sleep", "make memory executable"}
"""What a model needs, besides what both kinds of children need."""
REFUSED = {
    "open a file": errno.EACCES,
    "create a file": errno.EACCES,
    "read a link": errno.EACCES,
    "import": 254,
    "count the cores": errno.EPERM,
    "a younger call": errno.ENOSYS,
    "list a folder": errno.EACCES,
}
ENDED = (
    "a socket",
    "connect the wire",
    "accept",
    "execve",
    "fork",
    "map executable memory",
    "ptrace",
    "read another's memory",
    "kill the gateway",
    "io_uring",
    "become root",
)
ON_A_GPU = {
    "open a file": 0,
    "a socket": errno.EACCES,
    "connect the wire": errno.EPERM,
    "ptrace": errno.EPERM,
    "read another's memory": errno.EPERM,
    "kill the gateway": errno.EPERM,
    "io_uring": errno.EPERM,
    "bpf": errno.EPERM,
}
_numbers = itertools.count(1)

Ask = Callable[[str], Awaitable[object]]


@asynccontextmanager
async def taken_over(
    told: list[str] | None = None, model: str = "puppet", memory_bytes: int = 2**32
) -> AsyncIterator[tuple[Child, Ask]]:
    launch = worker_launch(
        worker="tests.integration.worker_intruder",
        model=model,
        device="cpu",
        dtype="fp32",
        threads=1,
        memory_bytes=memory_bytes,
        offline=True,
        start_s=60.0,
        silence_s=10.0,
        told=(told if told is not None else []).append,
    )
    child = await start_child(Starts(launch, first_uid=FIRST_UID).begin())
    await child.tell(Assign("acme"))

    async def ask(query: str) -> object:
        job = Job(Item(query), (Item("a document"),))
        return await child.ask(ScoreRequest(next(_numbers), "acme", job, time.monotonic() + 30))

    try:
        yield child, ask
    finally:
        await child.stop()


def number(reply: object) -> int:
    """What the kernel answered."""
    assert isinstance(reply, ScoreReply)
    return int(reply.scores.margins[0])


async def test_a_worker_that_was_taken_over_can_compute_and_nothing_more() -> None:
    told: list[str] = []
    async with taken_over(told) as (child, ask):
        answers = {name: number(await ask(f"act {name}")) for name in (*DONE, *REFUSED)}
        assert answers == dict.fromkeys(DONE, 0) | REFUSED
        assert child.alive
    assert told == []


async def test_what_no_model_needs_ends_the_worker() -> None:
    told: list[str] = []
    for name in ENDED:
        async with taken_over(told) as (_, ask):
            with pytest.raises(ChildLost):
                await ask(f"act {name}")
    assert told == [FORBIDDEN_CALL.decode()] * len(ENDED)


async def test_every_thread_of_a_worker_is_bound_and_it_goes_first_where_memory_runs_out() -> None:
    async with taken_over() as (child, ask):
        assert {measure.name for measure in child.hello.sandbox if measure.held} >= LOCK | {
            "data",
            "oom_first",
        }
        assert number(await ask("act a thread")) == 0
        for thread in Path(f"/proc/{child.pid}/task").iterdir():
            says = status(int(thread.name))
            assert (says["Seccomp"], says["NoNewPrivs"]) == ("2", "1")
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text() == "500\n"
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")] == ["0"]


async def test_a_job_that_needs_more_memory_than_a_worker_may_have_is_refused_and_the_worker_lives_on() -> (
    None
):
    async with taken_over(memory_bytes=2**30) as (_, ask):
        failed = await ask("act much memory")
        assert isinstance(failed, Failure) and failed.code == "memory"
        assert number(await ask("act a thread")) == 0


async def test_on_a_gpu_a_worker_has_no_network_and_says_what_does_not_hold() -> None:
    told: list[str] = []
    async with taken_over(told, model="puppet-cuda") as (child, ask):
        held = {measure.name: measure.held for measure in child.hello.sandbox}
        assert held["seccomp_offline"] and held["no_new_privs"] and held["oom_first"]
        assert not held["seccomp"] and not held["data"]
        assert {name: number(await ask(f"act {name}")) for name in ON_A_GPU} == ON_A_GPU
    assert told == []
