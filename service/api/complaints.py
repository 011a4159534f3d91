"""All that is wrong with a body, field by field, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from service.errors import BadRequest
from tenants.errors import Fault

REPEATED_CHARACTERS = 80
"""Of a field's name or another complaint, so much is repeated to the caller: they may be as long as the body."""
MOST_FAULTS = 50


def complaints(errors: Iterable[Mapping[str, Any]], *, skip: int = 0) -> tuple[Fault, ...]:
    """Pydantic's errors as faults, at most `MOST_FAULTS`. The first `skip` steps of a field's place are ours."""
    return tuple(_fault(error, skip) for error in list(errors)[:MOST_FAULTS])


def refuse(faults: tuple[Fault, ...]) -> BadRequest:
    """One complaint of several."""
    detail = f"{faults[0].field or 'The body'}: {faults[0].why}."
    if len(faults) > 1:
        detail = f"{len(faults)} things are wrong; `errors` has each. {detail}"
    return BadRequest(detail, field=faults[0].field or None, faults=faults)


def _fault(error: Mapping[str, Any], skip: int) -> Fault:
    field = _field(error["loc"][skip:])
    match error["type"]:
        case "json_invalid":
            return Fault("", f"not valid JSON: {error['ctx']['error']}"[: 2 * REPEATED_CHARACTERS])
        case "missing":
            return Fault(field, "is missing")
        case "extra_forbidden":
            return Fault(field, "is not a field of this request; remove it")
        case _:
            why = str(error["msg"])
            return Fault(field, why[:1].lower() + why[1 : 2 * REPEATED_CHARACTERS])


def _field(location: tuple[int | str, ...]) -> str:
    field = ""
    for part in location:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
    return field if len(field) <= REPEATED_CHARACTERS else f"{field[:REPEATED_CHARACTERS]}…"
