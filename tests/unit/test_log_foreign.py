"""What libraries and errors that nobody caught would print becomes lines of ours, without what a caller may have sent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
CANARY = "canary-4f1c what a caller sent"
START = "from service.watch.logs import configure, close\nconfigure('debug')\n"


def said(code: str, status: int = 0) -> list[dict[str, Any]]:
    """The lines of a process of its own that runs this, every one of them JSON and none with the canary."""
    done = subprocess.run(
        [sys.executable, "-c", START + code.replace("CANARY", repr(CANARY)) + "\nclose()\n"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and "canary" not in done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_of_a_library_s_log_only_what_stands_in_its_code_is_repeated() -> None:
    literal, template, built, fails, traced = said("""
import logging, traceback
log = logging.getLogger("some.library")
def speak():
    log.warning("Invalid HTTP request received.")
    log.warning("%d bytes of %s", 12, CANARY)
    log.warning(f"cannot read {CANARY}")
    log.info("unheard")
    try:
        raise ValueError(CANARY)
    except ValueError:
        log.exception("it broke")
        log.error(traceback.format_exc())
speak()
""")
    assert (literal["message"], literal["level"], literal["action"]) == (
        "Invalid HTTP request received.",
        "warning",
        "library",
    )
    assert literal["logger"] == "some.library" and literal["where"].endswith(" speak")
    assert template["message"] == "%d bytes of %s" and template["given"] == [12, f"<str {len(CANARY)}>"]
    assert "message" not in built and built["said"] == f"<str {len(CANARY) + 12}>"
    assert (fails["message"], fails["error"], fails["level"]) == ("it broke", "ValueError", "error")
    assert fails["raised"].endswith(" speak")
    assert traced["error"] == "ValueError" and traced["raised"].endswith(" speak")


def test_who_logs_goes_on_where_nobody_reads_the_pipe() -> None:
    """A pipe holds 64 KiB; the rest waits, and what does not fit into the buffer is dropped and counted."""
    code = """
import os
counted = []
configure("info", dropped=counted.append)
from service.watch.logs import get_logger
for number in range(20_000):
    get_logger("here").info("a sentence", action="sandbox", count=number)
print(sum(counted), flush=True)
os._exit(0)
"""
    with subprocess.Popen(
        [sys.executable, "-c", START + code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as talker:
        assert talker.stdout is not None and talker.stderr is not None
        dropped = int(talker.stdout.readline())  # it got there although nobody has read a line
        told = talker.stderr.read().splitlines()
    assert dropped > 5_000 and [json.loads(line)["count"] for line in told[:100]] == list(range(100))


def test_an_error_of_the_system_is_told_with_its_reason() -> None:
    (line,) = said("""
import errno, logging
logging.getLogger("uvicorn.error").error(OSError(errno.EADDRINUSE, "address already in use"))
""")
    assert line["error"] == "OSError" and "address already in use" in line["message"]


def test_a_task_s_forgotten_error_is_told_by_its_type() -> None:
    (line,) = said("""
import asyncio, gc
async def fail():
    raise ValueError(CANARY)
async def main():
    task = asyncio.ensure_future(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    gc.collect()
asyncio.run(main())
""")
    assert (line["logger"], line["error"]) == ("asyncio", "ValueError") and line["raised"].endswith(" fail")


def test_warnings_are_told_by_their_type() -> None:
    (line,) = said("import warnings\nwarnings.warn(CANARY, UserWarning)")
    assert (line["action"], line["error"], line["level"]) == ("library", "UserWarning", "warning")


def test_errors_that_nobody_caught_are_told_by_type_and_place() -> None:
    thread, nowhere, main = said(
        """
import threading
def fail():
    raise KeyError(CANARY)
thread = threading.Thread(target=fail, name="somebody")
thread.start()
thread.join()
class Bad:
    def __del__(self):
        raise KeyError(CANARY)
Bad()
raise RuntimeError(CANARY)
""",
        status=1,
    )
    assert (thread["error"], thread["thread"], thread["level"]) == ("KeyError", "somebody", "critical")
    assert thread["where"].endswith(" fail") or " fail <" in thread["where"]
    assert nowhere["error"] == "KeyError" and "__del__" in nowhere["where"]
    assert (main["error"], main["action"]) == ("RuntimeError", "unforeseen")
