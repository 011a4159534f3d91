"""The lock from inside: what a decoder that was taken over can still do, and what its kernel says of it from outside."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.errors import ImageRejected
from service.processes.children import FORBIDDEN_CALL, Child, bare_environ
from service.processes.landlock import CREATE_RULESET, PARTS, VERSION
from service.screening import ImageLimits
from service.screening.messages import REGION_BYTES
from service.screening.pool import Screen
from service.screening.readers import Readers
from tests.assets import images
from tests.integration.intruder import ACTS, FIRST_WIDTH
from tests.integration.served import Served, serve

LIMITS = ImageLimits(bytes=16 * 2**20, pixels=40_000_000, side=16_384, aspect=200, frames=1)
HARMLESS = images.encode(images.photo(64, 40), "PNG")
REFUSED = {
    "open a file": errno.EACCES,
    "create a file": errno.EACCES,
    "look at a path": errno.EACCES,
    "read a link": errno.EACCES,
    "import": 254,
    "randomness": errno.EPERM,
    "sleep": errno.EPERM,
    "count the cores": errno.EPERM,
    "ask what is waiting": errno.EPERM,
    "clone3": errno.ENOSYS,
    "a younger call": errno.ENOSYS,
    "lock with priorities": errno.ENOSYS,
    "list a folder": errno.EACCES,
}
"""What the kernel answers to these; everything else ends the child."""
OWN_END = {"abort", "much memory"}
ABI = ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION)
LOCK = {"seccomp", *(name for name, since in PARTS.items() if since <= ABI)}
OLD_KERNEL = (sys.executable, "-m", "tests.integration.old_kernel")


class TakenOver(Screen):
    """Children whose decoder is an intruder."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        argv = tuple(
            "tests.integration.intruder" if argument == "service.screening.child" else argument
            for argument in self._launch.argv
        )
        self._launch = replace(self._launch, argv=argv)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
async def taken_over(told: list[str]) -> AsyncIterator[Screen]:
    screen = TakenOver(limits=LIMITS, children=1, timeout_s=20.0, told=told.append)
    await screen.start()
    yield screen
    await screen.close()


def act(name: str) -> bytes:
    """An image that makes the intruder do it."""
    return images.encode(images.photo(FIRST_WIDTH + list(ACTS).index(name), 40), "PNG")


def only_child(screen: Screen) -> Child:
    (slot,) = screen._slots
    assert slot.child is not None
    return slot.child


def status(pid: int) -> dict[str, str]:
    """proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_what_an_interpreter_may_try_is_refused_and_the_child_lives_on(
    taken_over: Screen, told: list[str]
) -> None:
    before = only_child(taken_over).pid
    answers = {}
    for name in REFUSED:
        (cleaned,) = await taken_over.clean([act(name)])
        (answers[name],) = set(cleaned.pixels.data)
    assert answers == REFUSED
    assert only_child(taken_over).pid == before
    assert told == []


async def test_what_nobody_needs_ends_the_child_and_its_image_alone(
    taken_over: Screen, told: list[str]
) -> None:
    outcomes = {}
    pids = set()
    names = [name for name in ACTS if name not in REFUSED and name not in OWN_END]
    assert len(names) > 15
    for name in names:
        pids.add(only_child(taken_over).pid)
        try:
            (cleaned,) = await taken_over.clean([act(name)])
            outcomes[name] = f"answered {set(cleaned.pixels.data)}"
        except ImageRejected as exc:
            outcomes[name] = exc.reason or ""
        assert len(await taken_over.clean([HARMLESS])) == 1
    assert outcomes == dict.fromkeys(names, "crashed")
    assert told == [FORBIDDEN_CALL.decode()] * len(names)
    assert len(pids) == len(names)
    assert not Path("/tmp/intruder").exists()


async def test_a_child_may_abort_and_be_out_of_memory(taken_over: Screen, told: list[str]) -> None:
    with pytest.raises(ImageRejected) as caught:
        await taken_over.clean([act("much memory")])
    assert caught.value.reason == "too_complex"
    assert len(await taken_over.clean([HARMLESS])) == 1
    with pytest.raises(ImageRejected) as caught:
        await taken_over.clean([act("abort")])
    assert caught.value.reason == "crashed"
    assert told == []


async def test_every_thread_is_bound_and_nothing_is_open_but_what_was_inherited() -> None:
    screen = Screen(limits=LIMITS, children=1, timeout_s=20.0)
    readers = Readers(timeout_s=20.0)
    await asyncio.gather(screen.start(), readers.start())
    try:
        reader = readers._child
        assert reader is not None
        for child, region in ((only_child(screen), ["/memfd"]), (reader, [])):
            held = {measure.name for measure in child.hello.sandbox if measure.held}
            assert held >= LOCK
            threads = [int(each.name) for each in Path(f"/proc/{child.pid}/task").iterdir()]
            assert len(threads) == 2  # the main one, and its beat
            for thread in threads:
                says = status(thread)
                assert (says["Seccomp"], says["NoNewPrivs"]) == ("2", "1")
                assert int(says["Seccomp_filters"]) == int(status(os.getpid())["Seccomp_filters"]) + 1
            if os.geteuid() != 0:
                continue  # of a process that may not be dumped, only root sees what is open
            files = [os.readlink(each) for each in Path(f"/proc/{child.pid}/fd").iterdir()]
            kinds = sorted(file.partition(":")[0] for file in files)
            assert kinds == ["/dev/null", "/dev/null", *region, "pipe", "socket"]
    finally:
        await asyncio.gather(screen.close(), readers.close())


async def test_pixels_are_gone_from_the_memory_that_they_crossed_in(taken_over: Screen) -> None:
    (slot,) = taken_over._slots
    (cleaned,) = await taken_over.clean([images.encode(images.photo(1000, 1000), "JPEG")])
    assert len(set(cleaned.pixels.data)) > 100
    assert slot.region is not None
    assert slot.region.take(REGION_BYTES) == bytes(REGION_BYTES)
    for size in (0, 2 * REGION_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(slot.region.descriptor, size)


async def test_an_old_kernel_is_told_of_and_images_and_texts_are_still_screened() -> None:
    screen = Screen(limits=LIMITS, children=2, timeout_s=20.0)
    readers = Readers(timeout_s=20.0)
    for each in (screen, readers):
        each._launch = replace(each._launch, argv=(*OLD_KERNEL, *each._launch.argv))
    with capture_logs() as logs:
        await asyncio.gather(screen.start(), readers.start())
    try:
        for sandbox in (screen.sandbox, readers.sandbox):
            missing = {measure.name: measure.detail for measure in sandbox if not measure.held}
            assert missing == dict.fromkeys((*PARTS, "seccomp"), os.strerror(errno.ENOSYS))
        assert len(await screen.clean([HARMLESS])) == 1
        assert (await readers.read(["a text"]))[0].failed == ()
    finally:
        await asyncio.gather(screen.close(), readers.close())
    lines = [line for line in logs if line["action"] == "sandbox"]
    assert sorted(line["looks_at"] for line in lines) == ["images", "images", "texts"]
    assert all(set(line["missing"]) == {*PARTS, "seccomp"} for line in lines)


SHUT = """
import ctypes, os, signal, socket, sys, threading
from service.processes.landlock import shut
from service.processes.sandbox import PR_SET_NO_NEW_PRIVS, prctl

def tell(name, act):
    try:
        act()
    except OSError as exc:
        print(name, exc.errno)
    else:
        print(name, "done")

listener = socket.create_server(("127.0.0.1", 0))
if "early" in sys.argv:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
prctl(PR_SET_NO_NEW_PRIVS, 1)
for measure in shut():
    print(measure.name, measure.held)
tell("read", lambda: os.open("/etc/passwd", os.O_RDONLY))
tell("write", lambda: os.open("/tmp/intruder", os.O_CREAT | os.O_WRONLY))
tell("execute", lambda: os.execv("/bin/true", ["true"]))
tell("connect", lambda: socket.create_connection(listener.getsockname()))
tell("bind", lambda: socket.create_server(("127.0.0.1", 0)))
tell("signal", lambda: os.kill(os.getppid(), 0))
late = threading.Thread(target=lambda: tell("late", lambda: os.open("/etc/passwd", os.O_RDONLY)))
late.start()
late.join()
sys.stdout.flush()
os._exit(0)
"""


def shut(*arguments: str) -> dict[str, str]:
    command = [sys.executable, "-c", SHUT, *arguments]
    done = subprocess.run(command, env=bare_environ(), capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.skipif(ABI < 6, reason="this kernel's landlock knows less")
def test_landlock_alone_refuses_files_networks_and_signals() -> None:
    answers = shut()
    assert answers == {
        **dict.fromkeys(PARTS, "True"),
        **dict.fromkeys(("read", "write", "execute", "connect", "bind", "late"), str(errno.EACCES)),
        "signal": str(errno.EPERM),
    }


@pytest.mark.skipif(ABI < 1, reason="this kernel has no landlock")
def test_a_thread_that_began_before_is_told_of() -> None:
    """It alone stays outside: a lock that does not bind it is not reported as one that holds."""
    assert {name: held for name, held in shut("early").items() if name in PARTS} == dict.fromkeys(
        PARTS, "False"
    )


@pytest.fixture
def intruded(app_url: str, installation_secrets: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr("service.app.Screen", TakenOver)
    with serve(app_url, *installation_secrets.keys, judges_images=True) as served:
        yield served


def test_over_http_an_intruder_costs_its_own_image_and_no_other(intruded: Served) -> None:
    _, key = intruded.search_key(images_per_minute=100, images_per_request=4, requests_per_minute=100)

    def rerank(image: bytes) -> Any:
        document = {"image": base64.b64encode(image).decode()}
        return intruded.rerank({"query": "q", "documents": [document]}, key)

    assert rerank(HARMLESS).status_code == 200
    refused = rerank(act("a socket"))
    assert refused.status_code == 422
    assert (refused.json()["code"], refused.json()["reason"]) == ("image_rejected", "crashed")
    assert rerank(HARMLESS).status_code == 200
    with intruded.client() as client:
        told = client.get("/readyz").json()["screening"]["sandbox"]
    for sandbox in (told["images"], told["texts"]):
        assert {name for name, held in sandbox.items() if held} >= LOCK
