"""The corpus of malformed and odd files over HTTP: each is answered, in time, and never by a failure of ours."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass

import httpx
import pytest

from service.screening import REASONS
from tenants.kinds import ImageText
from tenants.risk import Action, Category
from tests.corpus import odd_files
from tests.integration.served import Served

pytestmark = pytest.mark.timeout(600)

LONGEST_S = 10.0
"""One request may take so long, on a machine that is busy with something else."""


@pytest.fixture(scope="module")
def judges_images() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    reason: str | None
    elapsed_s: float


def send(client: httpx.Client, path: str, body: object) -> Answer:
    start = time.perf_counter()
    answer = client.post(path, json=body)
    told = answer.json() if answer.status_code != 200 else {}
    if answer.status_code != 200:
        assert told["code"] == "image_rejected", told
        assert told["reason"] in REASONS
        assert told["detail"]
        assert told["field"] in ("documents[0].image", "image")
    return Answer(answer.status_code, told.get("reason"), time.perf_counter() - start)


def test_every_odd_file_is_ranked_or_refused_and_so_is_its_clean_image(service: Served) -> None:
    files = odd_files()
    _, key = service.search_key(
        images_per_minute=100_000,
        requests_per_minute=100_000,
        tokens_per_minute=60_000_000,
        risk_actions=tuple((category, Action.ALLOW) for category in Category),  # the decoder is what is asked
        image_text=ImageText.OFF,
    )
    surprises: list[str] = []
    accepted = 0
    with service.client(key) as client:
        for file in files:
            image = base64.b64encode(file.data).decode()
            ranked = send(client, "/v1/rerank", {"query": "q", "documents": [{"image": image}]})
            clean = send(client, "/v1/images/clean", {"image": image})
            accepted += ranked.status == 200
            for name, answer in (("rerank", ranked), ("clean", clean)):
                right = answer.status == (422 if answer.reason else 200) and file.may_be(answer.reason)
                if not right or answer.elapsed_s > LONGEST_S:
                    surprises.append(f"{file.name}: {file.suggest}, {name} {answer}")
        assert client.get("/readyz").status_code == 200
    assert surprises == []
    assert len(files) > 600
    assert accepted > 250
