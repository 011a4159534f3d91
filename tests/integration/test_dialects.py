"""What goes wrong on our side, told to each vendor's own client; and pairs, around workers whose model is a puppet."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cohere
import httpx
import pytest
import uvicorn
import voyageai
from voyageai.client import Client as VoyageClient

from service.app import create_app
from service.errors import CLIENT_CLOSED
from service.fleet.local import LocalFleet
from service.installation import Installation
from service.jobs import JOBS_AT_ONCE
from service.settings import Settings
from tenants.access import Role, TenantId
from tenants.audit import Audit, Entry, decode
from tenants.directory import Directory
from tenants.policy import Policy
from tests.closed_sessions import closed_sessions
from tests.integration.conftest import Secrets
from tests.integration.fleet_conformance import until

MODEL = "pericarp-demo"


@dataclass
class Served:
    """The service, listening, and one tenant of it."""

    url: str
    tenant: TenantId
    key: str
    audit: Audit
    fleet: LocalFleet

    async def post(self, path: str, body: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60) as client:
            return await client.post(path, json=body)

    async def ask_as_cohere(self, query: str) -> None:
        with cohere.ClientV2(self.key, base_url=f"{self.url}/cohere", max_retries=0) as client:
            await asyncio.to_thread(client.rerank, model=MODEL, query=query, documents=["a"])

    async def ask_as_voyage(self, query: str, truncation: bool = True) -> None:
        client = VoyageClient(api_key=self.key, base_url=f"{self.url}/voyage/v1", max_retries=1)

        def rank() -> None:
            with closed_sessions():
                client.rerank(query, ["a", "b"], MODEL, None, truncation)

        await asyncio.to_thread(rank)

    async def entries(self) -> list[Entry]:
        return [decode(each.body) for each in await self.audit.list_entries(self.tenant)]


@pytest.fixture
async def serve(
    app_url: str, installation_secrets: Secrets, directory: Directory, audit: Audit, tmp_path: Path
) -> AsyncIterator[Callable[..., Any]]:
    """Starts the service with these settings; everything ends with the test."""
    running: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    async def start(**settings: Any) -> Served:
        tenant = await directory.create_tenant(f"vendor-{secrets.token_hex(4)}", Policy())
        _, key = await directory.keys.create(tenant.id, Role.SEARCH)
        fleet = LocalFleet(model="puppet", worker="tests.integration.fake_worker", start_s=120)
        app = create_app(
            Settings(home=tmp_path, port=0, screeners=1, image_nets=False, image_text=False, **settings),
            Installation(app_url, None, *installation_secrets.keys),
            fleet=fleet,
        )
        server = uvicorn.Server(uvicorn.Config(app, port=0, http="httptools", ws="none", log_config=None))
        serving = asyncio.create_task(server.serve())
        running.append((server, serving))
        await until(lambda: server.started or serving.done(), 60)
        host, port = server.servers[0].sockets[0].getsockname()
        return Served(f"http://{host}:{port}", tenant.id, key, audit, fleet)

    yield start
    for server, serving in running:
        server.should_exit = True
        await serving


async def test_what_fails_on_our_side_raises_each_client_s_own_error(serve: Any) -> None:
    served = await serve()
    with pytest.raises(cohere.InternalServerError) as broken:
        await served.ask_as_cohere("nan")
    assert broken.value.status_code == 500
    assert set(broken.value.body) == {"id", "message"}
    with pytest.raises(voyageai.error.ServiceUnavailableError):
        await served.ask_as_voyage("fail")
    with pytest.raises(cohere.BadRequestError) as long:
        await served.ask_as_cohere("too-long")
    assert long.value.body["message"].startswith("invalid request: ")
    with pytest.raises(voyageai.error.InvalidRequestError):
        await served.ask_as_voyage("whole", truncation=False)
    await served.ask_as_voyage("whole")
    answer = await served.post("/jina/v1/rerank", {"model": MODEL, "query": "raise x", "documents": ["a"]})
    assert (answer.status_code, set(answer.json())) == (502, {"detail"})
    answer = await served.post("/vllm/rerank", {"query": "whole", "documents": ["a", "b"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "documents[1]"
    assert "truncate_prompt_tokens" in answer.json()["error"]["message"]
    answer = await served.post("/v1/score", {"queries": "exit", "documents": ["a"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)
    assert int(answer.headers["Retry-After"]) >= 1
    for entry in await served.entries():
        assert entry.status in (200, 422, 502, 503), "the log has the table's number"
    assert not [entry for entry in await served.entries() if entry.status == CLIENT_CLOSED]


async def test_a_deadline_and_a_busy_service_raise_each_client_s_own_error(serve: Any) -> None:
    served = await serve(deadline_s=1.0)
    with pytest.raises(cohere.GatewayTimeoutError):
        await served.ask_as_cohere("sleep 60")
    with pytest.raises(voyageai.error.ServiceUnavailableError):
        await served.ask_as_voyage("sleep 60")
    answer = await served.post("/jina/v1/rerank", {"model": MODEL, "query": "sleep 60", "documents": ["a"]})
    assert (answer.status_code, set(answer.json())) == (504, {"detail"})
    answer = await served.post("/vllm/score", {"queries": "sleep 60", "documents": ["a"]})
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "Gateway Timeout")


async def test_pairs_with_equal_queries_are_one_job_and_all_pairs_one_request(serve: Any) -> None:
    served = await serve()
    queries = ["p", "q", "p", "running", "p"]
    documents = ["a", "bb", "ccc", "dddd", "eeeee"]
    answer = await served.post("/v1/score", {"data_1": queries, "data_2": documents})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert [each["index"] for each in told["data"]] == [0, 1, 2, 3, 4]
    assert told["usage"]["prompt_tokens"] == 3, "the puppet reads one token a job"
    scores = [each["score"] for each in told["data"]]
    assert scores[0] < scores[2] < scores[4], "by the length of their own document"
    (entry,) = await served.entries()
    assert (entry.operation, entry.status, entry.document_count) == ("score", 200, 5)
    assert entry.query is None
    prints: Any = entry.details["queries"]
    assert [prints[at] == prints[0] for at in range(5)] == [True, False, True, False, True]
    assert [index for index, _ in entry.places] == [0, 1, 2, 3, 4]


async def test_one_pair_that_fails_fails_the_request_by_its_own_name(serve: Any) -> None:
    served = await serve()
    queries = ["p", "whole", "q", "whole"]
    answer = await served.post("/v1/score", {"text_1": queries, "text_2": ["a", "b", "c", "d"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "text_2[3]", "the last candidate of its job"
    cut = {"text_1": queries, "text_2": ["a", "b", "c", "d"], "truncate_prompt_tokens": -1}
    assert (await served.post("/v1/score", cut)).status_code == 200
    answer = await served.post("/v1/score", {"text_1": ["p", "nan"], "text_2": ["a", "b"]})
    assert answer.status_code == 502
    assert (await served.post("/v1/score", {"text_1": "p", "text_2": "a"})).status_code == 200


async def test_many_pairs_never_fill_their_tenant_s_queue(serve: Any) -> None:
    """More jobs than may wait for a worker, and only a few of them at a time."""
    served = await serve()
    count = 100
    queries = [f"running {index}" for index in range(count)]
    answer = await served.post("/v1/score", {"data_1": queries, "data_2": ["a"] * count})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == count
    # sigmoid of how many jobs were at the worker at once
    most = 1 / (1 + 2.718281828459045**-JOBS_AT_ONCE)
    assert max(each["score"] for each in answer.json()["data"]) <= most + 1e-9
    assert len(await served.entries()) == 1
