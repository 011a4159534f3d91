"""Nothing but pixels: of files with metadata of every kind, none is in what a worker gets, nor in a clean image."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.fleet.messages import ScoreRequest
from service.processes.wire import Vocabulary
from service.screening import METADATA
from tests.assets.planted import SIZE, Planted, canary, planted_jpeg, planted_png, planted_webp
from tests.integration.served import Served

PLANTED = [pytest.param(make, id=make.__name__) for make in (planted_jpeg, planted_png, planted_webp)]
Make = Callable[..., Planted]
UNREAD = {"xmp-extension", "mpf-image", "trailing", "iptc", "unknown"}
"""Kinds that exiftool need not find: an extension without its packet, what lies behind the image, raw profiles."""
HEADERS = {"ExifTool", "File", "System", "JFIF", "PNG", "RIFF", "Composite"}
"""Groups of exiftool's that a file of pixels alone has: its size and coding, and the JFIF header that a JPEG needs."""


@pytest.fixture(scope="module")
def judges_images() -> bool:
    return True


@pytest.fixture(scope="module")
def key(service: Served) -> str:
    return service.search_key(images_per_minute=1000, images_per_request=3, requests_per_minute=1000)[1]


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Every message to a worker that has pixels in it, as the bytes that cross to it."""
    sent: list[bytes] = []
    encode = Vocabulary.encode

    def record(self: Vocabulary, message: object) -> list[bytes]:
        buffers = encode(self, message)
        if isinstance(message, ScoreRequest):
            sent.append(b"".join(buffers))
        return buffers

    monkeypatch.setattr(Vocabulary, "encode", record)
    yield sent


def found(planted: Planted, data: bytes) -> list[str]:
    """Kinds whose canary is in `data`, plain, in UTF-16, in base64 or in hexadecimal."""
    return [
        kind
        for kind in planted.kinds
        if any(
            form in data
            for form in (
                canary(kind),
                canary(kind).decode().encode("utf-16-le"),
                canary(kind).decode().encode("utf-16-be"),
                base64.b64encode(canary(kind))[:-4],
                canary(kind).hex().encode(),
            )
        )
    ]


def inflated(png: bytes) -> bytes:
    """Whatever of a PNG can be inflated, one after another."""
    bodies = []
    at = 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        body = png[at + 8 : at + 8 + size]
        starts = [0, body.find(b"\0\0") + 2]
        for start in starts:
            try:
                bodies.append(zlib.decompressobj().decompress(body[start:]))
            except zlib.error:
                continue
        at += 12 + size
    return b"".join(bodies)


def exiftool(path: Path) -> dict[str, Any]:
    """All that it reads in a file, by group and name; values that are bytes are unpacked into one text."""
    done = subprocess.run(
        ["exiftool", "-a", "-u", "-U", "-G1", "-ee3", "-b", "-j", str(path)],
        capture_output=True,
        check=False,
        timeout=60,
    )
    (told,) = json.loads(done.stdout)
    blobs = b"".join(
        base64.b64decode(packed) for packed in re.findall(rb"base64:([A-Za-z0-9+/=]+)", done.stdout)
    )
    return {**told, "blobs": blobs.decode("latin-1")}


def image(planted: Planted) -> dict[str, str]:
    return {"image": base64.b64encode(planted.data).decode()}


def cleaned(service: Served, key: str, **body: Any) -> httpx.Response:
    with service.client(key) as client:
        answer = client.post("/v1/images/clean", json=body)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("make", PLANTED)
def test_what_is_planted_can_be_found(make: Make) -> None:
    planted = make()
    raw = found(planted, planted.data)
    assert set(planted.kinds) - set(raw) == planted.packed
    if planted.form == "png":
        assert planted.packed <= set(found(planted, inflated(planted.data)))


@pytest.mark.parametrize("make", PLANTED)
def test_nothing_planted_reaches_a_worker(service: Served, key: str, frames: list[bytes], make: Make) -> None:
    planted = make(orientation=6)
    body = {"query": {"text": "q", **image(planted)}, "documents": [image(planted), "text of a document"]}
    assert service.rerank(body, key).status_code == 200
    (frame,) = frames
    assert b"text of a document" in frame  # it is the message that crosses
    assert found(planted, frame) == []
    width, height = SIZE
    pixels = 28 * 56 * 3  # 40 × 64 upright, in whole patches of 28
    assert len(frame) > 2 * pixels
    assert len(frame) < 2 * 3 * (width + 28) * (height + 28) + 1000
    assert not any(name in frame for name in (b"exif", b"Exif", b"GPS", b"jumb", b"adobe"))


@pytest.mark.parametrize("make", PLANTED)
@pytest.mark.parametrize("form", [None, "jpeg", "png", "webp"])
def test_nothing_planted_is_in_a_clean_image(service: Served, key: str, make: Make, form: str | None) -> None:
    planted = make()
    data = cleaned(service, key, **image(planted), **({"format": form} if form else {})).content
    assert found(planted, data) == []
    if (form or planted.form) == "png":
        assert found(planted, inflated(data)) == []


@pytest.mark.parametrize("make", PLANTED)
def test_exiftool_finds_what_is_planted_and_nothing_in_a_clean_image(
    service: Served, key: str, tmp_path: Path, make: Make
) -> None:
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is not installed (Debian: libimage-exiftool-perl)")
    planted = make()
    before, after = tmp_path / f"before.{planted.form}", tmp_path / f"after.{planted.form}"
    before.write_bytes(planted.data)
    after.write_bytes(cleaned(service, key, **image(planted)).content)
    read = json.dumps(exiftool(before), ensure_ascii=False).encode()
    assert set(planted.kinds) - set(found(planted, read)) <= UNREAD
    told = exiftool(after)
    assert found(planted, json.dumps(told, ensure_ascii=False).encode()) == []
    groups = {name.partition(":")[0] for name in told if ":" in name}
    assert groups <= HEADERS
    assert told["blobs"] == ""
    assert not any("Warning" in name or "Comment" in name for name in told)


@pytest.mark.parametrize("make", PLANTED)
def test_the_answer_says_what_was_removed_by_kind_alone(service: Served, key: str, make: Make) -> None:
    planted = make()
    answer = cleaned(service, key, **image(planted))
    removed = answer.headers["Pericarp-Removed"].split(", ")
    assert {"exif", "icc", "xmp", "c2pa", "trailing"} <= set(removed) <= {*METADATA, "trailing"}
    if planted.form == "jpeg":
        assert {"thumbnail", "multi-picture", "iptc", "comment", "application"} <= set(removed)
    assert found(planted, str(answer.headers).encode()) == []
