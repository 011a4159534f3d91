"""The switch for an incident: what runs is stopped at every gateway, the log says what it was, release undoes it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from service.fleet.router import WorkerState
from tests.integration.administrators import ASK, House, build_house, make_key, problem
from tests.integration.conftest import Secrets
from tests.integration.served import Served, serve, until

SLEEP = {"query": "sleep 60", "documents": ["a"]}


@pytest.fixture(scope="module")
def second(service: Served, app_url: str, installation_secrets: Secrets) -> Iterator[Served]:
    """Another gateway on the same database."""
    with serve(app_url, *installation_secrets.keys) as served:
        yield served


@pytest.fixture
def platform(service: Served) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture
def house(service: Served, platform: httpx.Client) -> House:
    return build_house(service, platform)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as started:
        yield started


def running(gateway: Served, house: House) -> int:
    return sum(worker.running for worker in gateway.fleet.workers() if worker.tenant == house.id)


def served(worker: WorkerState) -> set[str]:
    return {each.tenant for each in worker.tenants}


def workers(gateway: Served, house: House) -> list[int]:
    return [worker.pid for worker in gateway.fleet.workers() if worker.tenant == house.id]


def test_a_contained_tenant_stops_at_every_gateway_and_the_log_says_what_ran(
    service: Served, second: Served, platform: httpx.Client, house: House, pool: ThreadPoolExecutor
) -> None:
    gateways = (service, second)
    stopped: list[Future[httpx.Response]] = [
        pool.submit(gateway.rerank, SLEEP, house.search) for gateway in gateways for _ in range(2)
    ]
    until(lambda: all(running(gateway, house) == 2 for gateway in gateways))
    pids = {pid for gateway in gateways for pid in workers(gateway, house)}
    contained = platform.post(f"{house.path}/contain", json={"reason": "It crashes workers."})
    assert (contained.status_code, contained.json()["state"]) == (200, "contained")
    for answer in (each.result(30) for each in stopped):
        told = problem(answer, 403, "forbidden")
        assert "results" not in told
    until(lambda: not any(workers(gateway, house) for gateway in gateways))
    for gateway in gateways:
        until(lambda gateway=gateway: gateway.rerank(ASK, house.search).status_code == 403)  # type: ignore[misc]

    told = {entry["operation"]: entry for entry in service.entries(house.name)}
    assert told["admin.contain"]["details"]["reason"] == "It crashes workers."
    assert told["admin.contain"]["role"] == "platform_admin"
    stops = [entry for entry in service.entries(house.name) if entry["operation"] == "admin.stop"]
    assert {entry["role"] for entry in stops} == {"gateway"}
    evidence = [worker for entry in stops for worker in entry["details"]["workers"]]
    assert {worker["pid"] for worker in evidence} == pids
    assert all(worker["running"] == 2 and worker["since_us"] > 0 for worker in evidence)
    requests = [request for entry in stops for request in entry["details"]["requests"]]
    broken = {each.result().headers["X-Request-Id"] for each in stopped}
    assert {request["id"] for request in requests} >= broken
    assert {request["key"] for request in requests if request["id"] in broken} == {house.search_id}

    released = platform.post(f"{house.path}/release", json={"reason": "Mended."})
    assert released.json()["state"] == "active"
    for gateway in gateways:
        until(lambda gateway=gateway: gateway.rerank(ASK, house.search).status_code == 200)  # type: ignore[misc]
    operations = [entry["operation"] for entry in service.entries(house.name)]
    assert "admin.release" in operations


def test_containing_one_tenant_disturbs_no_other(
    service: Served, platform: httpx.Client, house: House, pool: ThreadPoolExecutor
) -> None:
    other = build_house(service, platform)
    goes_on = pool.submit(service.rerank, {"query": "sleep 3", "documents": ["a"]}, other.search)
    until(lambda: running(service, other) == 1)
    assert service.rerank(ASK, house.search).status_code == 200
    platform.post(f"{house.path}/contain")
    assert goes_on.result(30).status_code == 200


def test_a_contained_tenant_of_a_pool_takes_no_other_with_it(
    service: Served, platform: httpx.Client, pool: ThreadPoolExecutor
) -> None:
    one, other = (build_house(service, platform, isolation="pooled", group="incidents") for _ in range(2))
    stopped = pool.submit(service.rerank, SLEEP, one.search)
    until(lambda: any(worker.running for worker in service.fleet.workers() if one.id in served(worker)))
    goes_on = pool.submit(service.rerank, {"query": "sleep 3", "documents": ["a"]}, other.search)
    until(lambda: any({one.id, other.id} <= served(worker) for worker in service.fleet.workers()))
    (shared,) = (worker.pid for worker in service.fleet.workers() if one.id in served(worker))
    service.wait(service.enforcement.report())
    listed = {each["tenant"]: each for each in platform.get("/admin/v1/workers").json()["data"]}
    for house in (one, other):
        told = listed[house.id]
        assert (told["pid"], told["running"], told["jobs"]) == (shared, 1, 0), "nothing of the other's"
    platform.post(f"{one.path}/contain")
    problem(stopped.result(30), 403, "forbidden")
    assert goes_on.result(30).status_code == 200
    assert shared not in {worker.pid for worker in service.fleet.workers()}
    assert service.rerank(ASK, other.search).status_code == 200


def test_a_contained_key_stops_alone(
    service: Served, second: Served, platform: httpx.Client, house: House, pool: ThreadPoolExecutor
) -> None:
    other = make_key(platform, house.id)
    stopped = [pool.submit(gateway.rerank, SLEEP, house.search) for gateway in (service, second)]
    goes_on = pool.submit(service.rerank, {"query": "sleep 4", "documents": ["a"]}, other["key"])
    until(lambda: running(service, house) == 2 and running(second, house) == 1)
    before = workers(service, house)
    path = f"{house.path}/keys/{house.search_id}"
    contained = platform.post(f"{path}/contain", json={"reason": "Found in a repository."})
    assert (contained.status_code, contained.json()["state"]) == (200, "contained")
    for answer in (each.result(30) for each in stopped):
        problem(answer, 403, "forbidden")
    assert goes_on.result(30).status_code == 200
    assert workers(service, house) == before, "the tenant's worker goes on"
    until(lambda: service.rerank(ASK, house.search).status_code == 401)
    until(lambda: second.rerank(ASK, house.search).status_code == 401)
    assert platform.get(path).json()["state"] == "contained"
    assert platform.post(f"{path}/release").json()["state"] == "active"
    until(lambda: service.rerank(ASK, house.search).status_code == 200)
    operations = {entry["operation"] for entry in service.entries(house.name)}
    assert operations >= {"admin.key_contain", "admin.key_release", "admin.stop"}


def test_a_tenants_administrator_contains_its_own_and_only_the_platform_lets_go(
    service: Served, platform: httpx.Client, house: House
) -> None:
    with service.client(house.admin) as own:
        assert own.post(f"{house.path}/contain").json()["state"] == "contained"
        until(lambda: own.get(house.path).status_code == 403)
        assert own.post(f"{house.path}/release").status_code == 403
    assert platform.post(f"{house.path}/release").json()["state"] == "active"


def test_twice_is_as_good_as_once_and_what_is_not_there_is_404(platform: httpx.Client, house: House) -> None:
    first = platform.post(f"{house.path}/contain").json()
    assert platform.post(f"{house.path}/contain").json() == first
    assert platform.post(f"{house.path}/release").json() == platform.post(f"{house.path}/release").json()
    problem(platform.post(f"{house.path}/keys/AAAAAAAAAAAA/contain"), 404, "key_not_found")
    told = problem(
        platform.post(f"{house.path}/contain", json={"reason": 5, "who": 1}), 422, "invalid_request"
    )
    assert {fault["field"] for fault in told["errors"]} == {"reason", "who"}


def test_a_deleted_tenants_workers_end(service: Served, platform: httpx.Client, house: House) -> None:
    assert service.rerank(ASK, house.search).status_code == 200
    assert workers(service, house)
    platform.delete(house.path)
    until(lambda: not workers(service, house))


def test_workers_sessions_and_usage_are_told(
    service: Served, second: Served, platform: httpx.Client, house: House
) -> None:
    for gateway in (service, second):
        assert gateway.rerank(ASK, house.search).status_code == 200
        gateway.wait(gateway.enforcement.report())
    listed = [each for each in platform.get("/admin/v1/workers").json()["data"] if each["tenant"] == house.id]
    assert {each["pid"] for each in listed} == {*workers(service, house), *workers(second, house)}
    assert len({each["gateway"] for each in listed}) == 2
    assert all(each["jobs"] == 1 and each["running"] == 0 for each in listed)
    with service.client(house.admin) as own:
        mine = [(each["gateway"], each["pid"]) for each in own.get("/admin/v1/workers").json()["data"]]
        assert mine == [(each["gateway"], each["pid"]) for each in listed]
        seen, cursor = [], None
        while True:
            told = own.get(
                "/admin/v1/workers", params={"limit": 1} | ({"cursor": cursor} if cursor else {})
            ).json()
            seen += [(each["gateway"], each["pid"]) for each in told["data"]]
            if (cursor := told["next_cursor"]) is None:
                break
        assert seen == mine

    with service.client(house.search) as search:
        opened = [search.post("/v1/sessions").json()["id"] for _ in range(3)]
    path = f"{house.path}/sessions"
    first = platform.get(path, params={"limit": 2}).json()
    rest = platform.get(path, params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [each["id"] for each in first["data"] + rest["data"]] == opened[::-1]
    assert platform.delete(f"{path}/{opened[0]}").status_code == 204
    problem(platform.delete(f"{path}/{opened[0]}"), 404, "session_not_found")
    assert len(platform.get(path).json()["data"]) == 2
    entry = next(each for each in service.entries(house.name) if each["operation"] == "admin.session_close")
    assert entry["decision"] in ("answered", "refused")

    (used,) = platform.get(f"{house.path}/usage").json()["data"]
    assert (used["key_id"], used["requests"]) == (house.search_id, 2)
    assert platform.get(f"{house.path}/usage", params={"key_id": "AAAAAAAAAAAA"}).json()["data"] == []
    assert platform.get(f"{house.path}/usage", params={"until": "2020-01-01"}).json()["data"] == []
    for query in (
        {"since": "yesterday"},
        {"since": "2020-01-02", "until": "2020-01-01"},
        {"since": "2001-01-01"},
    ):
        told = problem(platform.get(f"{house.path}/usage", params=query), 422, "invalid_request")
        assert told["field"] == "since"
