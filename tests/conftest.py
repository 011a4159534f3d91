"""What acceptance and fault tests share: one running service for the whole session, started as a user starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance import commands
from tests.acceptance.service_process import Service, Tenant, new_home, serving

BODY_LIMIT_BYTES = 4 * 1024 * 1024
IMAGE_LIMIT_BYTES = 1024 * 1024
MODEL_ALIASES = ("rerank-v3.5", "jina-reranker-m0", "rerank-2.5")


@pytest.fixture(scope="session", autouse=True)
def command_server() -> Iterator[None]:
    """What forks for commands is started by the first of them, and ends with the tests."""
    yield
    commands.end()


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """The service with its demo tenant, ready. Its body and image caps are low, so that tests can pass them, and its log
    is the most talkative."""
    with (
        new_home() as home,
        serving(
            home,
            "--demo",
            PERICARP_BODY_LIMIT_BYTES=str(BODY_LIMIT_BYTES),
            PERICARP_IMAGE_LIMIT_BYTES=str(IMAGE_LIMIT_BYTES),
            PERICARP_MODEL_ALIASES=", ".join(MODEL_ALIASES),
            PERICARP_LOG_LEVEL="debug",
        ) as started,
    ):
        yield started


@pytest.fixture(scope="session")
def demo(service: Service) -> Tenant:
    """The tenant that `serve --demo` made, with the key that it printed."""
    (tenant,) = (each for each in service.tell("tenant", "list") if each["name"] == "demo")
    return Tenant("demo", tenant["id"], service.key, service.key.split("_")[2])


@pytest.fixture(scope="session")
def acme(service: Service) -> Tenant:
    """A second tenant, made by the command line while the service runs."""
    return service.make_tenant("acme")
