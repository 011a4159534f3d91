"""The log takes a closed list of actions, and an error only by its type and place."""

from __future__ import annotations

import ast
import asyncio
import errno
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from service.watch import logs
from service.watch.log_writer import BUFFERED_LINES
from service.watch.logs import ACTIONS, close, configure, get_logger, request_of, where_it_broke

SERVICE = Path(logs.__file__).parents[1]
METHODS = {"debug", "info", "warning", "error", "critical", "exception"}


@pytest.fixture(autouse=True)
def _leave_no_log_behind() -> Iterator[None]:
    root, raising = list(logging.root.handlers), logging.raiseExceptions
    hooks = warnings.showwarning, sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    close()
    structlog.reset_defaults()
    logging.root.handlers[:], logging.raiseExceptions = root, raising
    warnings.showwarning, sys.excepthook, threading.excepthook, sys.unraisablehook = hooks


def told(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The lines of this process's stderr, once all are written."""
    close()
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def logged() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the service that writes a log line."""
    for path in sorted(SERVICE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in METHODS
                and ast.unparse(node.func.value) in ("log", "self._log", "self.log", "logger")
            ):
                yield f"{path.relative_to(SERVICE)}:{node.lineno}", node


def action_of(call: ast.Call) -> object:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "action"]
    return given[0].value if given and isinstance(given[0], ast.Constant) else None


def test_every_line_of_the_log_has_an_action_of_the_list() -> None:
    lines = list(logged())
    assert len(lines) >= 8
    assert {where: action_of(call) for where, call in lines if action_of(call) not in ACTIONS} == {}


def test_every_action_of_the_list_is_written_somewhere() -> None:
    assert {action_of(call) for _, call in logged()} == ACTIONS


def test_a_line_s_sentence_is_fixed_and_holds_no_value() -> None:
    for where, call in logged():
        assert isinstance(call.args[0], ast.Constant), where
        assert len(call.args) == 1, where


def test_a_line_is_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    configure("info")
    get_logger("here").warning("a sentence", action="sandbox", missing=["uid"], reason='"quoted"\nline')
    (line,) = told(capfd)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "source": "here",
        "event": "a sentence",
        "level": "warning",
        "action": "sandbox",
        "missing": ["uid"],
        "reason": '"quoted" line',
    }


def test_below_its_level_nothing_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    configure("info")
    get_logger("here").debug("a sentence", action="sandbox")
    assert told(capfd) == []


@pytest.mark.parametrize("action", ["made_up", "", None])
def test_an_action_that_is_not_on_the_list_is_refused(action: str | None) -> None:
    configure("info")
    with pytest.raises(ValueError, match="without a known action"):
        get_logger("here").info("a sentence", action=action)


async def test_lines_of_a_request_have_its_ids_until_it_is_over(capfd: pytest.CaptureFixture[str]) -> None:
    configure("info")
    log, go_on = get_logger("here"), asyncio.Event()

    async def outlive() -> None:
        log.info("inside", action="sandbox")
        await go_on.wait()
        log.info("after", action="sandbox")

    with request_of("id-1", "trace-1"):
        log.info("inside", action="sandbox")
        task = asyncio.create_task(outlive())
        await asyncio.sleep(0)
    with request_of("id-2", "trace-2"):
        go_on.set()
        await task
    log.info("after", action="sandbox")
    ids = [(line["event"], line.get("request_id"), line.get("trace_id")) for line in told(capfd)]
    assert ids == [
        ("inside", "id-1", "trace-1"),
        ("inside", "id-1", "trace-1"),
        ("after", None, None),
        ("after", None, None),
    ]


def test_lines_come_in_order_and_all_of_them(capfd: pytest.CaptureFixture[str]) -> None:
    configure("info")
    for number in range(5000):
        get_logger("here").info("a sentence", action="sandbox", count=number)
    assert [line["count"] for line in told(capfd)] == list(range(5000))


def test_dropped_lines_are_counted_and_told_once_there_is_room(capfd: pytest.CaptureFixture[str]) -> None:
    stuck = threading.Event()
    lines: list[dict[str, Any]] = []
    counted: list[int] = []

    def hang(data: bytes) -> None:
        stuck.wait()
        lines.extend(map(json.loads, data.splitlines()))

    configure("info", folder=hang, dropped=counted.append)
    for number in range(BUFFERED_LINES + 1000):
        get_logger("here").info("a sentence", action="sandbox", count=number)
    stuck.set()
    close()
    (dropped,) = (line for line in lines if line["action"] == "log_dropped")
    assert len(counted) == dropped["count"] > 0
    assert len(lines) - 1 + dropped["count"] == BUFFERED_LINES + 1000
    assert capfd.readouterr().err == ""


def test_a_folder_that_fails_is_told_once_and_stderr_takes_its_lines(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(_data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    configure("info", folder=full)
    for number in range(3):
        get_logger("here").info("a sentence", action="sandbox", count=number)
    lines = told(capfd)
    assert [line["count"] for line in lines if line["action"] == "sandbox"] == [0, 1, 2]
    (failed,) = (line for line in lines if line["action"] == "log_unwritable")
    assert (failed["error"], failed["reason"]) == ("OSError", "No space left on device")


def test_where_it_broke_names_places_and_repeats_no_message() -> None:
    def inner() -> None:
        raise ValueError("what the caller sent")

    try:
        inner()
    except ValueError as exc:
        told = where_it_broke(exc)
    assert told.startswith("test_logs.py:")
    assert "inner" in told
    assert "caller" not in told
    assert "/" not in told
