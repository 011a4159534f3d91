"""What others would print of this process: libraries' logs, warnings, and errors that nobody caught.

They become lines like ours, action `library` or `unforeseen`, and say where it was said and of which type an error is.
Of what is said only literals of the code that says it are repeated: a text that was put together may hold a caller's.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, TextIO

from service.watch.redaction import told

if TYPE_CHECKING:
    from types import TracebackType

RAISED = re.compile(r'File "([^"\n]+)", line (\d+), in ([\w<>]+)')
ERROR_TYPE = re.compile(r"([A-Za-z_][\w.]*)(?=:|$)")
FRAMES = 3


def where_it_broke(exc: BaseException) -> str:
    """The innermost frames of an exception as `file:line function`, without its message."""
    frames = traceback.extract_tb(exc.__traceback__)[-FRAMES:]
    return " < ".join(_place(frame.filename, frame.lineno, frame.name) for frame in reversed(frames))


def listen(log: Any) -> None:
    """Send to `log`, from now on, what would otherwise be printed. Libraries are heard from `WARNING` on.

    Installs this process's only handler of `logging`, and the hooks of `warnings`, `sys` and `threading`.
    """
    logging.basicConfig(level=logging.WARNING, handlers=[_Handler(log)], force=True)
    logging.raiseExceptions = False  # it would print the line that it could not write

    def warn(
        message: Warning | str,  # it may hold anything
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        where = _place(filename, lineno, "")
        log.warning("a library warns", action="library", error=category.__name__, where=where)

    def uncaught(
        kind: type[BaseException], exc: BaseException | None, trace: TracebackType | None, thread: str
    ) -> None:
        place = where_it_broke(exc.with_traceback(trace)) if exc is not None else ""
        log.critical(
            "an error that nobody caught",
            action="unforeseen",
            error=kind.__name__,
            where=place,
            thread=thread,
        )

    def end(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
        uncaught(kind, exc, trace, "main")

    def end_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            name = args.thread.name if args.thread else ""
            uncaught(args.exc_type, args.exc_value, args.exc_traceback, name)

    def end_nowhere(args: sys.UnraisableHookArgs) -> None:
        uncaught(args.exc_type, args.exc_value, args.exc_traceback, "")

    warnings.showwarning = warn
    sys.excepthook = end
    threading.excepthook = end_thread
    sys.unraisablehook = end_nowhere


class _Handler(logging.Handler):
    def __init__(self, log: Any) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One record as a line of ours."""
        fields: dict[str, Any] = {
            "logger": record.name,
            "where": _place(record.pathname, record.lineno, record.funcName),
        }
        if record.exc_info and record.exc_info[1] is not None:
            fields |= {
                "error": type(record.exc_info[1]).__name__,
                "raised": where_it_broke(record.exc_info[1]),
            }
        fields |= _read_message(record)
        say = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        say("a library says something", action="library", **fields)


def _read_message(record: logging.LogRecord) -> dict[str, Any]:
    """What of a record's text may be repeated."""
    said = record.msg
    if isinstance(said, OSError):  # of the system, with an address or a file of ours
        return {"error": type(said).__name__, "message": str(said)}
    if isinstance(said, BaseException):
        return {"error": type(said).__name__, "raised": where_it_broke(said)}
    if isinstance(said, str) and _is_literal(said, record):
        given = record.args if isinstance(record.args, tuple) else (record.args,) if record.args else ()
        numbers = [each if isinstance(each, int | float) else told(each) for each in given]
        return {"message": said, **({"given": numbers} if numbers else {})}
    text = str(said) if isinstance(said, str) else ""
    if text.startswith("Traceback "):
        *_, last = text.rstrip().splitlines()
        frames = [_place(file, int(line), name) for file, line, name in RAISED.findall(text)][-FRAMES:]
        kind = ERROR_TYPE.match(last)
        return {"error": kind[1] if kind else "", "raised": " < ".join(reversed(frames))}
    return {"said": told(said)}


def _is_literal(text: str, record: logging.LogRecord) -> bool:
    """Whether the text stands in the code of the function that logs it, so that nobody can have put anything into it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == record.pathname and code.co_name == record.funcName:
            return text in _strings(code)
        frame = frame.f_back
    return False


def _strings(code: CodeType) -> set[str]:
    return {each for each in code.co_consts if isinstance(each, str)}


def _place(file: str, line: int | None, function: str | None) -> str:
    return f"{Path(file).name}:{line} {function or ''}".rstrip()
