"""A backend that stores images has them cleaned: by the real service, with its keys, limits and log."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.api.images import wants_json
from tests.acceptance.service_process import Service, Tenant
from tests.assets.images import SECRETS, encode, huge_png, photo, secretive_jpeg, secretive_png
from tests.conftest import IMAGE_LIMIT_BYTES

PNG = encode(photo(96, 64), "PNG")
JPEG = encode(photo(96, 64), "JPEG")


@pytest.fixture(scope="module")
def tenant(service: Service) -> Tenant:
    made = service.make_tenant("picture-store")
    service.tell("tenant", "policy", made.name, "images_per_minute=100")
    return made


def clean(service: Service, tenant: Tenant, image: bytes, accept: str = "*/*", **body: Any) -> httpx.Response:
    with service.client(tenant.key, Accept=accept) as client:
        return client.post("/v1/images/clean", json={"image": base64.b64encode(image).decode(), **body})


def test_an_image_comes_back_at_full_size_upright_and_bare(service: Service, tenant: Tenant) -> None:
    answer = clean(service, tenant, secretive_png(PNG, orientation=6))
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Pericarp-Removed"] == "c2pa, exif, icc, text, time, unknown, xmp, trailing"
    assert [secret for secret in SECRETS.values() if secret in answer.content] == []
    with Image.open(io.BytesIO(answer.content)) as image, Image.open(io.BytesIO(PNG)) as stored:
        assert np.array_equal(np.asarray(image), np.rot90(np.asarray(stored), -1))


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_it_comes_in_the_format_that_is_asked_for(service: Service, tenant: Tenant, form: str) -> None:
    answer = clean(service, tenant, JPEG, format=form)
    assert answer.headers["Content-Type"] == f"image/{form}"
    assert "Pericarp-Removed" not in answer.headers
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format or "").lower() == form
        assert image.size == (96, 64)


def test_as_json_it_says_what_it_is_and_what_was_removed(service: Service, tenant: Tenant) -> None:
    answer = clean(service, tenant, secretive_jpeg(JPEG, orientation=8), accept="application/json")
    told = answer.json()
    assert answer.headers["Content-Type"] == "application/json"
    assert base64.b64decode(told.pop("image")).startswith(b"\xff\xd8\xff")
    removed = told.pop("removed")
    assert {"exif", "xmp", "icc", "iptc", "c2pa", "comment", "thumbnail", "trailing"} <= set(removed)
    assert told == {
        "id": answer.headers["X-Request-Id"],
        "object": "image",
        "format": "jpeg",
        "width": 64,
        "height": 96,
        "trailing_bytes": len(SECRETS["trailing"]),
    }


def test_it_counts_as_one_image_and_stands_in_the_log(service: Service) -> None:
    tenant = service.make_tenant("picture-counter")
    answer = clean(service, tenant, secretive_jpeg(JPEG))
    assert '"images";r=19' in answer.headers["RateLimit"]
    (entry,) = (each for each in service.entries(tenant.name) if each["operation"] == "clean_image")
    assert entry["id"] == answer.headers["Pericarp-Receipt"]
    assert (entry["operation"], entry["decision"], entry["status"]) == ("clean_image", "answered", 200)
    assert (entry["image_count"], entry["document_count"], entry["input_tokens"]) == (1, 0, 0)
    assert entry["query"]["image"]
    assert "exif" in entry["details"]["removed"]
    with service.client(tenant.key) as client:
        today = client.get("/v1/usage").json()["today"]
    assert (today["requests"], today["images"], today["tokens"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("body", "code", "field", "reason"),
    [
        ({}, "invalid_request", "image", None),
        ({"image": "x", "image_url": "y"}, "invalid_request", "image", None),
        ({"image": "not base64"}, "invalid_request", "image", None),
        ({"image": ""}, "invalid_request", "image", None),
        ({"image": "QUJD", "format": "gif"}, "invalid_request", "format", None),
        ({"image": "QUJD", "quality": 3}, "invalid_request", "quality", None),
        ({"image": "https://img.example/a.png"}, "invalid_request", "image", None),
        ({"image": base64.b64encode(b"text").decode()}, "image_rejected", "image", "format"),
        ({"image_url": {"url": "data:image/png;base64,QUJD"}}, "image_rejected", "image_url", "format"),
        ({"image": base64.b64encode(PNG[:-20]).decode()}, "image_rejected", "image", "damaged"),
        ({"image": base64.b64encode(huge_png()).decode()}, "image_rejected", "image", "too_many_pixels"),
        (
            {"image": base64.b64encode(bytes(IMAGE_LIMIT_BYTES + 1)).decode()},
            "image_rejected",
            "image",
            "too_many_bytes",
        ),
    ],
)
def test_what_is_wrong_is_said(
    service: Service, tenant: Tenant, body: dict[str, Any], code: str, field: str, reason: str | None
) -> None:
    with service.client(tenant.key) as client:
        answer = client.post("/v1/images/clean", json=body)
    told = answer.json()
    assert answer.status_code == 422, told
    assert (told["code"], told.get("field"), told.get("reason")) == (code, field, reason)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Pericarp-Receipt"]


def test_a_tenant_without_images_has_none_cleaned(service: Service) -> None:
    tenant = service.make_tenant("picture-less")
    service.tell("tenant", "policy", tenant.name, "images_per_request=0")
    assert clean(service, tenant, PNG).status_code == 422


def test_it_needs_a_search_key(service: Service) -> None:
    with service.client("") as client:
        assert client.post("/v1/images/clean", json={}).status_code == 401
    admin = service.make_key("demo", "tenant_admin")["key"]
    with service.client(admin) as client:
        assert client.post("/v1/images/clean", json={}).status_code in (401, 403)


@pytest.mark.parametrize(
    ("accept", "json"),
    [
        ("application/json", True),
        ("image/png;q=0.5, Application/JSON ; q=0.9", True),
        ("application/json;q=0", False),
        ("application/json;q=0.000", False),
        ("application/json;q=0.001", True),
        ("*/*", False),
        ("application/*", False),
        ("image/webp", False),
        ("", False),
    ],
)
def test_json_is_what_accept_names(accept: str, json: bool) -> None:
    assert wants_json(accept) is json


def test_it_is_described(service: Service) -> None:
    with service.client("") as client:
        schema = client.get("/openapi.json").json()
    post = schema["paths"]["/v1/images/clean"]["post"]
    assert {"application/json", "image/jpeg", "image/png", "image/webp"} <= set(
        post["responses"]["200"]["content"]
    )
    shape = schema["components"]["schemas"]["CleanImageRequest"]
    assert set(shape["properties"]) == {"image", "image_url", "format"}
