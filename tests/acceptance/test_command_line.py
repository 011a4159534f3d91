"""Mistakes at the command line end with one clear sentence, never with a stack trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from sqlalchemy import make_url

from tenants import embedded
from tests.acceptance.service_process import (
    REPOSITORY,
    START_S,
    Service,
    Tenant,
    command,
    environment,
    launch,
    until,
)

ASK = {"query": "q", "documents": ["a"]}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PERICARP_PORT", "eighty", "valid integer"),
        ("PERICARP_PORT", "70000", "65535"),
        ("PERICARP_DTYPE", "fp8", "pattern"),
        ("PERICARP_SCREENERS", "0", "greater than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it(
    tmp_path: Path, name: str, value: str, says: str
) -> None:
    done = command(tmp_path / "home", "serve", "--demo", **{name: value})
    assert done.returncode == 2
    assert done.stdout == ""
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith(f"{name}: ")
    assert says in sentence
    assert not (tmp_path / "home").exists(), "nothing was begun"


@pytest.mark.parametrize("arguments", [["--help"], ["key", "nonsense"], ["migrate"]])
def test_a_command_started_from_nothing_says_what_a_forked_one_says(
    tmp_path: Path, arguments: list[str]
) -> None:
    mistake = {"PERICARP_PORT": "eighty"}  # so that `migrate` ends at once
    done = subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=REPOSITORY,
        env=environment(tmp_path, **mistake),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    forked = command(tmp_path, *arguments, **mistake)
    assert (forked.returncode, forked.stdout, forked.stderr) == (done.returncode, done.stdout, done.stderr)


def test_a_database_of_ones_own_needs_both_urls(tmp_path: Path) -> None:
    done = command(
        tmp_path / "home", "serve", PERICARP_OWNER_DATABASE_URL="postgresql://owner:top-secret@/pericarp"
    )
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    assert "PERICARP_DATABASE_URL" in sentence
    assert "top-secret" not in sentence


def test_the_service_refuses_to_run_as_the_databases_superuser(service: Service, tmp_path: Path) -> None:
    with embedded.running(service.home) as server:
        url = make_url(server.superuser_url).set(database="pericarp")
        done = command(
            tmp_path / "home",
            "serve",
            PERICARP_DATABASE_URL=url.render_as_string(hide_password=False),
        )
    assert done.returncode == 1
    assert "UnsafeRole" in done.stderr
    assert "superuser" in done.stderr
    assert "Traceback" not in done.stderr
    assert str(url.password) not in done.stderr
    assert done.stdout == "", "it was never ready"


def test_the_service_refuses_to_run_as_the_owner_of_the_tables(service: Service, tmp_path: Path) -> None:
    password = (service.home / "secrets" / "postgres-owner").read_bytes().hex()
    with embedded.running(service.home) as server:
        url = make_url(server.superuser_url).set(
            username="pericarp_owner", password=password, database="pericarp"
        )
        done = command(
            tmp_path / "home",
            "serve",
            PERICARP_DATABASE_URL=url.render_as_string(hide_password=False),
        )
    assert done.returncode == 1
    assert "UnsafeRole" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_service_on_the_same_port_ends_and_leaves_the_first_alone(service: Service) -> None:
    port = urlsplit(service.url).port
    second = launch(service.home, "--demo", PERICARP_PORT=str(port))
    try:
        assert second.process.wait(60) != 0
    finally:
        second.process.kill()
    until(lambda: not second.orphans(), 10)
    assert "address already in use" in second.stderr
    assert "Traceback" not in second.stderr
    assert second.stdout == ""
    assert service.rerank(ASK).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tenant", "create", "acme"), "TenantExists: "),
        (("tenant", "create", "Not A Name"), "InvalidName: "),
        (("key", "create", "nobody"), "TenantNotFound: "),
        (("key", "revoke", "aaaaaaaaaaaa"), "KeyNotFound: "),
        (("tenant", "policy", "acme", "images_per_minute=-1"), "InvalidPolicy: "),
        (("tenant", "policy", "acme", "no_such_limit=1"), "InvalidPolicy: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_command_is_one_sentence(
    service: Service, acme: Tenant, arguments: tuple[str, ...], says: str
) -> None:
    done = service.run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith(says)


def test_a_role_that_does_not_exist_is_refused_with_those_that_do(service: Service, acme: Tenant) -> None:
    done = service.run("key", "create", acme.name, "--role", "root")
    assert done.returncode == 2
    for role in ("search", "tenant_admin", "auditor", "platform_admin"):
        assert role in done.stderr
