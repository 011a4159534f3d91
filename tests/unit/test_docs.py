"""The docs name everything that an operator or a caller can meet; what is added without a word in them fails here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from service.__main__ import app
from service.api import items, moderations, schemas
from service.api.admin import shapes
from service.api.admin.threshold_shapes import (
    CanaryShape,
    DecidedReview,
    Feedback,
    Rollback,
    ThresholdAnswer,
    ThresholdChange,
    ThresholdsAnswer,
)
from service.api.dialects import DIALECTS
from service.api.door import OPEN_PATHS
from service.api.images import CLEAN_PATH, CleanImageAnswer, CleanImageRequest
from service.api.inquiry import shapes as inquiry_shapes
from service.api.usage import KeySpans, LimitState, UsageAnswer, Used
from service.app import create_app
from service.errors import TABLE, describe
from service.exports import COLUMNS, FORMS
from service.installation import Installation
from service.screening import REASONS
from service.settings import Settings
from service.watch import metrics
from service.watch.logs import ACTIONS
from tenants.access import Role
from tenants.audit import Decision
from tenants.limits import KEY_NAMES, NAMES
from tenants.policy import Policy
from tenants.risk import Action

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
API = (ROOT / "docs" / "api.md").read_text()
ADMINISTRATION = (ROOT / "docs" / "administration.md").read_text()
AUDITING = (ROOT / "docs" / "auditing.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
SESSIONS = ("/v1/sessions", "/v1/sessions/{session_id}")
LOG = (
    "/v1/receipts/{receipt_id}",
    "/audit/v1/receipts/{receipt_id}",
    "/audit/v1/checkpoint",
    "/audit/v1/tile/{level}/{path}",
)
TYPERS_OWN = {"--help", "--install-completion", "--show-completion"}


def settings_table() -> list[str]:
    """The README's table of settings: `python -c 'from tests.unit.test_docs import *; print(*settings_table(), sep="\\n")'`."""
    rows = ["| variable | default | what it does |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        if field.default is PydanticUndefined:
            default = "the cores of this machine"
        else:
            default = "unset" if field.default in (None, ()) else f"`{field.default}`"
        rows.append(f"| `PERICARP_{name.upper()}` | {default} | {field.description} |")
    return rows


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command of the command line, with its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def rows_of(page: str, word: str) -> list[str]:
    """The table rows whose first cell holds `word` in backticks, alone or as the beginning of a command."""
    cells = re.compile(rf"\| [^|]*`{re.escape(word)}(?![\w-])")
    return [line for line in page.splitlines() if cells.match(line)]


def test_the_readme_has_the_table_of_settings() -> None:
    expected = settings_table()
    found = [
        line for line in README.read_text().splitlines() if line.startswith(("| variable |", "| `PERICARP_"))
    ]
    assert found == [expected[0], *expected[2:]], "the table should be:\n\n" + "\n".join(expected) + "\n"


@pytest.mark.parametrize("code", sorted({meaning.code for meaning in TABLE.values()} | {"internal"}))
def test_every_error_code_stands_in_the_api_page_with_its_status(code: str) -> None:
    statuses = {meaning.status for meaning in TABLE.values() if meaning.code == code} or {
        describe(Exception()).status
    }
    assert any(f"| {status} |" in row for status in statuses for row in rows_of(API, code))


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_to_refuse_an_image_stands_in_the_api_page(reason: str) -> None:
    assert rows_of(API, reason)


@pytest.mark.parametrize(
    "path",
    sorted(
        {path for path in OPEN_PATHS if "." not in path}
        | {path for dialect in DIALECTS for path in dialect.paths}
        | {CLEAN_PATH, "/v1/models", "/v1/moderations", "/v1/usage", "/metrics", *SESSIONS, *LOG}
    ),
)
def test_every_path_stands_in_the_api_page(path: str) -> None:
    assert re.search(rf"`(GET|POST|DELETE) {path}`", API)


@pytest.mark.parametrize(
    ("prefix", "page", "least"), [("/admin/", ADMINISTRATION, 20), ("/audit/", AUDITING, 8)]
)
def test_every_path_of_an_administrator_or_auditor_stands_in_its_page(
    prefix: str, page: str, least: int
) -> None:
    app = create_app(
        Settings(), Installation("postgresql://nobody@/nothing", None, bytes(32), bytes(32), bytes(32))
    )
    paths = {path: methods for path, methods in app.openapi()["paths"].items() if path.startswith(prefix)}
    assert len(paths) >= least
    missing = [
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method in methods
        if f"`{method.upper()} {path}`" not in page
    ]
    assert missing == []


@pytest.mark.parametrize(
    "word",
    [
        *(field.alias or name for name, field in inquiry_shapes.EntrySearch.model_fields.items()),
        *inquiry_shapes.InputShape.model_fields,
        *inquiry_shapes.SearchAnswer.model_fields,
        *inquiry_shapes.EntryAnswer.model_fields,
        *inquiry_shapes.FoundPage.model_fields,
        *inquiry_shapes.DayCount.model_fields,
        *(str(word) for word in (*Decision, *Action)),
        *FORMS,
        *COLUMNS,
    ],
)
def test_every_word_of_an_auditor_stands_in_its_page(word: str) -> None:
    assert re.search(rf"[`\"]{word}[`\"]", AUDITING)


def test_every_operation_of_an_administrator_stands_in_its_page() -> None:
    told = "".join(
        (ROOT / "service" / f"{name}.py").read_text()
        for name in ("administration", "containment", "adapting", "silencing")
    )
    operations = set(re.findall(r'\b(?:deed|entry|tell)\(\s*[\w.()| ]+,\s*"(\w+)"', told))
    assert len(operations) >= 24
    assert [name for name in operations if f"`admin.{name}`" not in ADMINISTRATION] == []


@pytest.mark.parametrize(
    "shape",
    [
        shapes.TenantAnswer,
        shapes.PolicyAnswer,
        shapes.CeilingAnswer,
        shapes.IssuedKey,
        shapes.UsageDay,
        shapes.WorkerAnswer,
        ThresholdAnswer,
        ThresholdChange,
        ThresholdsAnswer,
        DecidedReview,
        Feedback,
        Rollback,
        CanaryShape,
        shapes.Page,
    ],
)
def test_every_field_of_an_administrators_answer_stands_in_its_page(shape: type[BaseModel]) -> None:
    assert [name for name in shape.model_fields if not re.search(rf"\b{name}\b", ADMINISTRATION)] == []


@pytest.mark.parametrize(
    "field",
    [
        *(name for dialect in DIALECTS for name in dialect.request.model_fields),
        *items.TextAndImage.model_fields,
        *items.Content.model_fields,
        *schemas.SessionRequest.model_fields,
        *moderations.ModerationRequest.model_fields,
        *CleanImageRequest.model_fields,
    ],
)
def test_every_field_of_a_request_stands_in_the_api_page(field: str) -> None:
    assert f"`{field}`" in API


@pytest.mark.parametrize(
    "shape",
    [
        schemas.RerankAnswer,
        schemas.Result,
        schemas.Usage,
        schemas.Meta,
        schemas.BilledUnits,
        schemas.Problem,
        schemas.SessionUse,
        schemas.SessionAnswer,
        schemas.OpenSessions,
        schemas.ScreenedItem,
        moderations.ModerationAnswer,
        moderations.ModerationResult,
        CleanImageAnswer,
        UsageAnswer,
        Used,
        LimitState,
        KeySpans,
    ],
)
def test_every_field_of_an_answer_stands_in_the_api_page(shape: type[BaseModel]) -> None:
    names = [field.alias or name for name, field in shape.model_fields.items()]
    assert [name for name in names if not re.search(rf"`[\w.\[\]]*\b{name}\b[\w.\[\]]*`", API)] == []


@pytest.mark.parametrize("family", list(metrics.REGISTRY.collect()), ids=lambda family: str(family.name))
def test_every_metric_stands_in_the_operations_page(family: Any) -> None:
    assert rows_of(OPERATIONS, family.name + ("_total" if family.type == "counter" else ""))


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_every_log_action_stands_in_the_operations_page(action: str) -> None:
    assert rows_of(OPERATIONS, action)


@pytest.mark.parametrize(
    ("words", "command"), [pytest.param(*each, id=each[0]) for each in commands(typer.main.get_command(app))]
)
def test_every_command_stands_in_the_operations_page_with_its_options(words: str, command: Any) -> None:
    (row,) = rows_of(OPERATIONS, words)
    options = {name for each in command.params for name in each.opts if name.startswith("--")} - TYPERS_OWN
    assert {name for name in options if name not in row and name != "--json"} == set()


@pytest.mark.parametrize("limit", [field.name for field in fields(Policy)])
def test_every_limit_of_a_policy_stands_in_the_operations_page_with_its_default(limit: str) -> None:
    (row,) = rows_of(OPERATIONS, limit)
    default = json.loads(Policy().to_json())[limit]
    assert ("unset" if default is None else json.dumps(default).strip('"')) in row.split("|")[2]


@pytest.mark.parametrize("limit", [*NAMES, *KEY_NAMES])
def test_every_limit_of_admission_stands_in_the_api_page(limit: str) -> None:
    assert rows_of(API, limit) or any(f"`{limit}`" in row for row in API.splitlines() if row.startswith("|"))


@pytest.mark.parametrize("role", list(Role))
def test_every_role_stands_in_the_operations_page(role: Role) -> None:
    assert f"`{role}`" in OPERATIONS


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.exists()], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
            }, target
