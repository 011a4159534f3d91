"""What the API's page says of administration and auditing: each path is described, and its examples would be taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.api.admin.router import BODIES
from service.api.inquiry.shapes import BODIES as INQUIRY_BODIES
from service.app import create_app
from service.installation import Installation
from service.settings import Settings
from tenants.ceiling import Ceiling
from tenants.policy import Policy

SHAPES = {f"#/components/schemas/{shape.__name__}": shape for shape in (*BODIES, *INQUIRY_BODIES)}


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    app = create_app(
        Settings(), Installation("postgresql://nobody@/nothing", None, bytes(32), bytes(32), bytes(32))
    )
    for path, methods in app.openapi()["paths"].items():
        if path.startswith(("/admin/", "/audit/v1/entries", "/audit/v1/counts")):
            yield from ((f"{method.upper()} {path}", operation) for method, operation in methods.items())


OPERATIONS = dict(operations())


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_described_with_all_that_may_be_answered(name: str) -> None:
    operation = OPERATIONS[name]
    assert operation["summary"] and len(operation["description"]) > 10
    assert all(
        parameter.get("description") or parameter["in"] == "path"
        for parameter in operation.get("parameters", [])
    )
    assert "HTTPValidationError" not in json.dumps(operation)
    assert {"401", "403", "404", "503"} <= set(operation["responses"])
    success = next(response for status, response in operation["responses"].items() if status < "300")
    assert name.startswith("DELETE") or success["content"]["application/json"]["schema"]["$ref"]


@pytest.mark.parametrize("name", [name for name, each in OPERATIONS.items() if "requestBody" in each])
def test_the_examples_of_a_body_are_taken(name: str) -> None:
    content = OPERATIONS[name]["requestBody"]["content"]["application/json"]
    examples = [example["value"] for example in content["examples"].values()]
    assert examples
    for example in examples:
        if "$ref" in content["schema"]:
            SHAPES[content["schema"]["$ref"]].model_validate_json(json.dumps(example))
        elif name.endswith("ceiling"):
            Ceiling.from_json(json.dumps(example))
        else:
            Policy.from_json(json.dumps({key: value for key, value in example.items() if value is not None}))
