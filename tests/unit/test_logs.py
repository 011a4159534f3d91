"""The log takes a closed list of actions, and an error only by its type and place."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from service.watch import logs
from service.watch.logs import ACTIONS, configure, get_logger, where_it_broke

SERVICE = Path(logs.__file__).parents[1]
METHODS = {"debug", "info", "warning", "error", "critical", "exception"}


@pytest.fixture(autouse=True)
def _leave_no_log_behind() -> Iterator[None]:
    yield
    structlog.reset_defaults()


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


def test_a_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    get_logger("here").warning("a sentence", action="sandbox", missing=["uid"], text='"quoted"\nline')
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told.pop("timestamp").endswith("Z")
    assert told == {
        "source": "here",
        "event": "a sentence",
        "level": "warning",
        "action": "sandbox",
        "missing": ["uid"],
        "text": '"quoted"\nline',
    }


def test_below_its_level_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    get_logger("here").debug("a sentence", action="sandbox")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("action", ["made_up", "", None])
def test_an_action_that_is_not_on_the_list_is_refused(action: str | None) -> None:
    configure("info")
    with pytest.raises(ValueError, match="without a known action"):
        get_logger("here").info("a sentence", action=action)


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
