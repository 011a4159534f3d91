"""What Prometheus reads of a running service: on a port of its own, bounded, without a secret or a text, and true.

`tests/unit/test_exposition.py` has what it reads of one whose database is away.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.housekeeping import tell_backups
from service.watch.metrics import CONTENT_TYPE
from tenants.backups import Made
from tenants.kinds import ImageText
from tenants.policy import Isolation
from tenants.risk import Action, Category
from tests.assets.images import encode, photo
from tests.integration.conftest import Secrets
from tests.integration.served import Served, serve, until

OPERATIONS = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
SECRET = "canary-in-a-text"
ASK = {"query": SECRET, "documents": ["a", "b"]}
IMAGE = "data:image/png;base64," + base64.b64encode(encode(photo(40, 40), "PNG")).decode()
BROKEN = "data:image/png;base64," + base64.b64encode(b"GIF89a" + bytes(40)).decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def service(app_url: str, installation_secrets: Secrets, port: int) -> Iterator[Served]:
    """As everywhere, with a port for metrics, and two tenants that they tell apart."""
    with serve(app_url, *installation_secrets.keys, metrics_port=port, metrics_tenants=2) as served:
        yield served


def search_key(service: Served, **limits: Any) -> tuple[str, str]:
    """A new tenant and its key; all of them share one worker, and ask for no detector that the service went without."""
    allowed = tuple((category, Action.ALLOW) for category in Category)
    return service.search_key(
        isolation=Isolation.POOLED, group="all", risk_actions=allowed, image_text=ImageText.OFF, **limits
    )


def scrape(port: int) -> dict[str, float]:
    """Every series, by its name and labels as they are written."""
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30)
    assert (answer.status_code, answer.headers["content-type"]) == (200, CONTENT_TYPE)
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def grown(before: dict[str, float], after: dict[str, float], series: str) -> float:
    return after.get(series, 0.0) - before.get(series, 0.0)


def test_the_port_of_their_own_shows_metrics_and_nothing_else(service: Served, port: int) -> None:
    base = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{base}/metrics").status_code == 200
    assert httpx.post(f"{base}/metrics").status_code == 405
    for path in ("/", "/readyz", "/v1/rerank", "/docs", "/metrics/"):
        assert httpx.get(base + path, follow_redirects=False).status_code in (307, 404), path
    with service.client() as platform:
        assert platform.get("/metrics").status_code == 404, "and the service's port has none any more"
        assert "/metrics" not in platform.get("/openapi.json").json()["paths"]


def test_what_a_request_did_is_counted_once(service: Served, port: int) -> None:
    _, key = search_key(service)
    before = scrape(port)
    assert service.rerank({"query": "q", "documents": ["a", "bb", {"image": IMAGE}]}, key).status_code == 200
    after = scrape(port)
    expected = {
        'pericarp_requests_total{operation="/v1/rerank",status="200"}': 1,
        "pericarp_documents_total": 3,
        "pericarp_images_total": 1,
        "pericarp_input_tokens_total": 1,  # so says the puppet
        "pericarp_image_tokens_total": 1600,
        "pericarp_computed_tokens_total": 1,
        'pericarp_stage_seconds_count{stage="queue"}': 1,
        'pericarp_stage_seconds_count{stage="settle"}': 1,
        'pericarp_cache_total{cache="image_findings",outcome="miss"}': 1,
        'pericarp_cache_total{cache="text_findings",outcome="miss"}': 3,
    }
    assert {series: grown(before, after, series) for series in expected} == expected
    assert service.rerank({"query": "q", "documents": ["a", {"image": IMAGE}]}, key).status_code == 200
    again = scrape(port)
    assert grown(after, again, 'pericarp_cache_total{cache="image_findings",outcome="hit"}') == 1
    assert grown(after, again, 'pericarp_cache_total{cache="text_findings",outcome="hit"}') == 2


def test_two_tenants_are_told_apart_and_all_others_are_one(service: Served, port: int) -> None:
    tenants = [search_key(service) for _ in range(4)]
    ids = {}
    for name, key in tenants:
        assert service.rerank(ASK, key).status_code == 200
        ids[name] = str(service.wait(service.desk.directory.find_tenant(name)).id)
    told = scrape(port)
    labels = {label for series in told for label in re.findall(r'tenant="([^"]+)"', series)}
    assert len(labels) <= 3 and "other" in labels
    assert told['pericarp_tenant_requests_total{outcome="answered",tenant="other"}'] >= 2
    assert not any(name in series for name in ids for series in told), "a name may say whose customer it is"
    length = len(told)
    for _, key in [search_key(service) for _ in range(2)]:
        assert service.rerank(ASK, key).status_code == 200
    assert len(scrape(port)) == length, "nothing grew with two more tenants"


def test_refusals_are_counted_by_their_reason(service: Served, port: int) -> None:
    _, key = search_key(service, request_burst=1, requests_per_minute=1)
    _, other = search_key(service)
    before = scrape(port)
    assert service.rerank(ASK, key).status_code == 200
    assert service.rerank(ASK, key).status_code == 429
    assert service.rerank({"query": "q", "documents": [{"image": BROKEN}]}, other).status_code == 422
    assert service.rerank({"query": "q", "documents": []}, other).status_code == 422
    assert service.rerank(ASK, "prc_live_nobody").status_code == 401
    after = scrape(port)
    expected = {
        'pericarp_refusals_total{code="quota_exceeded"}': 1,
        'pericarp_limits_total{limit="requests",outcome="refused"}': 1,
        'pericarp_refusals_total{code="image_rejected"}': 1,
        'pericarp_image_refusals_total{reason="format"}': 1,
        'pericarp_refusals_total{code="invalid_request"}': 1,
        'pericarp_unauthenticated_total{code="unauthenticated"}': 1,
    }
    assert {series: grown(before, after, series) for series in expected} == expected


def test_what_workers_do_and_what_becomes_of_them_is_told(service: Served, port: int) -> None:
    _, key = search_key(service)
    before = scrape(port)
    assert service.rerank({"query": "work", "documents": ["a"]}, key).status_code == 200
    worked = scrape(port)
    expected = {
        "pericarp_packs_total": 1,
        "pericarp_packed_tokens_total": 2,
        "pericarp_pack_room_tokens_total": 3,
        'pericarp_cache_total{cache="image_features",outcome="hit"}': 4,
        'pericarp_cache_total{cache="image_features",outcome="miss"}': 5,
        'pericarp_cache_total{cache="prefix",outcome="hit"}': 6,
        'pericarp_cache_total{cache="prefix",outcome="miss"}': 7,
        'pericarp_cache_total{cache="candidate",outcome="hit"}': 8,
        'pericarp_cache_total{cache="candidate",outcome="miss"}': 9,
    }
    assert {series: grown(before, worked, series) for series in expected} == expected
    died = 'pericarp_worker_ends_total{reason="died"}'
    os.kill(next(state.pid for state in service.fleet.workers() if state.jobs), signal.SIGKILL)
    until(lambda: grown(worked, scrape(port), died) == 1)
    assert worked['pericarp_worker_starts_total{outcome="ready"}'] >= 1
    assert worked['pericarp_ready{part="worker"}'] == worked['pericarp_ready{part="screening"}'] == 1
    with service.client() as platform:
        detectors = platform.get("/readyz").json()["screening"]["detectors"]
    assert detectors, "an alert on a detector's first failure needs a zero before it"
    assert {
        worked[f'pericarp_detector_failures_total{{detector="{each["name"]}"}}'] for each in detectors
    } == {0}


def test_the_age_of_backups_is_told_as_the_database_knows_it(service: Served, port: int) -> None:
    desk = service.desk

    async def note() -> None:
        async with desk.database.together():
            await desk.backups.note(Made(1, uuid.uuid4(), "full", None, 0, 1, bytes(32)))
        await tell_backups(desk.backups)

    before_s = time.time()
    service.wait(note())
    told = scrape(port)
    assert before_s - 1 <= told['pericarp_backup_timestamp_seconds{step="run"}'] <= time.time() + 1
    assert told['pericarp_backup_timestamp_seconds{step="verify"}'] == 0, "there never was one"


def test_every_series_is_documented_and_none_holds_what_was_sent(service: Served, port: int) -> None:
    _, key = search_key(service)
    assert service.rerank(ASK, key).status_code == 200
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    families = list(text_string_to_metric_families(text))
    assert len(families) > 40
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert re.search(rf"\| [^|]*`{name}`", OPERATIONS), name
    assert "pericarp_requests_created" not in text
    for secret in (SECRET, key, key.split("_")[-1], service.platform_key, "127.0.0.1"):
        assert secret not in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not here")
def test_promtool_has_nothing_to_say_against_them(service: Served, port: int) -> None:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
