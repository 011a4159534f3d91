"""The page on incidents works as it stands there; what it keeps proves itself, and what is changed in it is named."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cobblestone import NotAuthentic
from service.__main__ import app
from service.preserving import Parcel
from tenants.errors import EntryNotFound, TenantNotFound
from tenants.provisioning import Urls
from tenants.sequencer import log_signer
from tests.acceptance.service_process import REPOSITORY
from tests.integration.conftest import Secrets
from tests.integration.served import Served

PAGE = (REPOSITORY / "docs" / "incidents.md").read_text()
CANARY = "canary-words-of-an-incident"
FILES = {
    "MANIFEST",
    "configuration.json",
    "counts.json",
    "entries.jsonl",
    "incident.json",
    "log.jsonl",
    "tenants.json",
}
PROGRAM = REPOSITORY / "tools" / "verify_incident.py"


@dataclass(frozen=True, slots=True)
class Host:
    """Where commands run: the folder, the environment, the tenant that the incident is about, and its key."""

    folder: Path
    environ: dict[str, str]
    tenant: str
    key: str
    log_key: str

    def run(self, *words: str) -> Any:
        """`python -m service` in this process, `3<FILE` as in a shell; what it printed, or raises what it raised."""
        given = [word for word in words if not word.startswith("3<")]
        for word in words:
            if word.startswith("3<"):
                descriptor = os.open(self.folder / word.removeprefix("3<"), os.O_RDONLY)
                given[given.index("--seal-fd") + 1] = str(descriptor)
        done = CliRunner().invoke(app, given, env=self.environ)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, (given, done.output)
        return done.stdout

    def status(self, *words: str) -> int:
        return CliRunner().invoke(app, list(words), env=self.environ).exit_code


@pytest.fixture(scope="module")
def host(
    service: Served, urls: Urls, installation_secrets: Secrets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """All of the page's commands were run here, one after the other, as an operator would."""
    folder = tmp_path_factory.mktemp("host")
    secrets = folder / "home" / "secrets"
    secrets.mkdir(mode=0o700, parents=True)
    for name, secret in zip(("pepper", "master-key", "log-key"), installation_secrets.keys, strict=True):
        (secrets / name).write_bytes(secret)
    shutil.copytree(REPOSITORY / "tools", folder / "tools")
    tenant, key = service.search_key()
    assert service.rerank({"query": CANARY, "documents": [CANARY]}, key).status_code == 200
    environ = {
        "PERICARP_HOME": str(folder / "home"),
        "PERICARP_DATABASE_URL": urls.app_url,
        "PERICARP_OWNER_DATABASE_URL": urls.owner_url,
    }
    made = Host(folder, environ, tenant, key, "")
    made = Host(folder, environ, tenant, key, made.run("audit", "key").strip())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TENANT", tenant)
        patch.setenv("URL", service.url)
        patch.setenv("ADMIN", service.platform_key)
        for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL):
            for line in block.splitlines():
                run_line(made, line)
        yield made


def run_line(host: Host, line: str) -> None:
    """One line of the page. A command of ours runs in this process, for speed; the rest in a shell."""
    words = shlex.split(os.path.expandvars(line))
    if words[:3] == ["python", "-m", "service"]:
        host.run(*words[3:])
        return
    line = line.replace("$(python -m service audit key)", host.log_key)
    line = re.sub(r"^python ", f"{sys.executable} -P ", line)
    done = subprocess.run(["bash", "-euc", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    if "verify_incident" in line:
        assert "are all that the log has of that time" in done.stdout


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_an_incident_is_kept_with_all_that_tells_of_it(host: Host) -> None:
    kept = host.folder / "incident-1"
    assert {path.name for path in kept.iterdir()} == FILES | {"metrics.txt"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in (kept, *kept.iterdir()))
    entries = lines_of(kept / "entries.jsonl")
    by_operation = {entry["body"]["operation"]: entry for entry in entries}
    assert {"rerank", "admin.contain"} <= by_operation.keys()
    told = json.loads((kept / "incident.json").read_bytes())
    assert told["tenant"]["name"] == host.tenant and told["log_broken"] is None
    (exported,) = [line for line in lines_of(kept / "log.jsonl") if "admin.incident_export" in str(line)]
    assert exported["body"]["details"] == {
        "from": told["window"]["from"],
        "to": told["window"]["to"],
        "sealed": 0,
    }
    assert told["versions"]["packages"]["cryptography"]
    assert {entry["tenant"] for entry in entries} == {told["tenant"]["id"]}
    (about,) = json.loads((kept / "tenants.json").read_bytes())
    assert about["tenant"]["state"] == "contained" and about["policies"][0]["version"] == 1
    assert [each["id"] for each in about["keys"]] == [host.key.split("_")[2]]
    counts = json.loads((kept / "counts.json").read_bytes())
    assert sum(each["count"] for each in counts if each["operation"] == "rerank") == 1
    assert "pericarp_requests_total" in (kept / "metrics.txt").read_text()


def test_no_secret_and_no_input_is_in_it(host: Host, installation_secrets: Secrets) -> None:
    everything = b"".join(path.read_bytes() for path in (host.folder / "incident-1").iterdir())
    passwords = (installation_secrets.owner_password, installation_secrets.app_password)
    keys = installation_secrets.keys
    for secret in (
        *keys,
        *(each.hex().encode() for each in keys),
        *map(str.encode, (*passwords, host.key, CANARY)),
    ):
        assert secret not in everything
    configuration = json.loads((host.folder / "incident-1" / "configuration.json").read_bytes())
    assert configuration["database_url"] == "**********"


def test_a_sealed_one_opens_under_its_key_alone_and_is_the_same(host: Host) -> None:
    sealed, opened = host.folder / "incident-2", host.folder / "incident-3"
    assert {path.name for path in sealed.iterdir()} == {f"{name}.sealed" for name in FILES}
    assert b"rerank" not in b"".join(path.read_bytes() for path in sealed.iterdir())
    assert {path.name for path in opened.iterdir()} == FILES
    (host.folder / "other.key").write_bytes(os.urandom(32))
    with pytest.raises(NotAuthentic):
        host.run("incident", "open", str(sealed), "no", "--seal-fd", "3", "3<other.key")
    (sealed / "log.jsonl.sealed").rename(sealed / "entries.jsonl.sealed")
    with pytest.raises(NotAuthentic):
        host.run("incident", "open", str(sealed), "no", "--seal-fd", "3", "3<incident.key")
    assert not (host.folder / "no").exists()


def test_an_entry_names_its_tenant_and_the_time_before_it(host: Host) -> None:
    entries = lines_of(host.folder / "incident-1" / "entries.jsonl")
    (contained,) = [each for each in entries if each["body"]["operation"] == "admin.contain"]
    told = json.loads(host.run("incident", "export", "by-entry", "--entry", contained["id"], "--json"))
    assert told["sealed"] is False and told["entries"] >= len(entries)
    about = json.loads((host.folder / "by-entry" / "incident.json").read_bytes())
    assert about["tenant"]["name"] == host.tenant
    day_before = contained["recorded_at"].replace("T", " ")[:10]
    assert about["window"]["from"][:10] < day_before


def test_a_time_is_what_it_is_about_and_all_tenants_are_in_one_without_any(host: Host) -> None:
    told = json.loads(
        host.run(
            "incident",
            "export",
            "all",
            "--from",
            "2020-01-01T00:00:00Z",
            "--to",
            "2020-01-02T00:00:00Z",
            "--json",
        )
    )
    assert told["entries"] == 0
    assert (host.folder / "all" / "entries.jsonl").read_bytes() == b""
    names = {
        each["tenant"]["name"] for each in json.loads((host.folder / "all" / "tenants.json").read_bytes())
    }
    assert host.tenant in names and len(names) > 1
    run_line(host, f"python tools/verify_incident.py all --key {host.log_key}")


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda at: edit(at / "entries.jsonl", b"rerank", b"RERANK"),
            "entries.jsonl is not the file that was signed",
        ),
        (lambda at: edit(at / "log.jsonl", b"rerank", b"RERANK"), "log.jsonl is not the file"),
        (lambda at: (at / "tenants.json").unlink(), "tenants.json is missing"),
        (lambda at: (at / "more.json").write_text("{}"), "more.json is not in the manifest"),
        (lambda at: edit(at / "MANIFEST", b" counts.json", b" counts.txt"), "signature does not hold"),
        (lambda at: edit(at / "MANIFEST", b"incident/v1", b"incident/v2"), "none of an incident"),
        (lambda at: (at / "MANIFEST").write_text("nothing"), "none of an incident"),
    ],
    ids=range(7),
)
def test_what_was_changed_afterwards_is_named(
    change: Callable[[Path], Any], why: str, host: Host, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(host.folder / "incident-1", tmp_path / "copy"))
    change(copy)
    status, said = verify(copy, host.log_key)
    assert status == (2 if "none of" in why else 1) and why in said


def test_who_has_the_key_cannot_leave_out_an_entry(
    host: Host, installation_secrets: Secrets, tmp_path: Path
) -> None:
    """What is signed again after an entry was taken out of what people read does not agree with the log's tree."""
    copy = Path(shutil.copytree(host.folder / "incident-1", tmp_path / "copy"))
    lines = (copy / "entries.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "entries.jsonl").write_bytes(b"".join(lines[1:]))
    signed = tmp_path / "signed"
    signed.mkdir()
    parcel = Parcel(signed, None)
    for path in sorted(copy.iterdir()):
        if path.name != "MANIFEST":
            parcel.put(path.name, path.read_bytes())
    parcel.close(log_signer(installation_secrets.log_key), datetime.now(UTC))
    status, said = verify(signed, host.log_key)
    assert status == 1 and "entries.jsonl" in said


def test_it_is_of_that_log_alone(host: Host) -> None:
    other = "example.com/log+" + host.log_key.split("+", 1)[1]
    assert verify(host.folder / "incident-1", other)[0] == 2
    assert verify(host.folder, host.log_key)[0] == 2


def verify(folder: Path, key: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM), str(folder), "--key", key],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_words_that_make_no_sense_leave_no_folder(host: Host) -> None:
    for words in (
        ("--tenant", host.tenant, "--entry", "x"),
        ("--entry", "x"),
        ("--from", "yesterday"),
        ("--to", "2026-01-01T00:00:00"),
        ("--from", "2026-01-02T00:00:00Z", "--to", "2026-01-01T00:00:00Z"),
        ("--metrics", "/no/such/file"),
    ):
        assert host.status("incident", "export", "out", *words) == 2, words
    assert host.status("incident", "export", "incident-1") == 2
    with pytest.raises(TenantNotFound):
        host.run("incident", "export", "out", "--tenant", "nobody-there")
    with pytest.raises(EntryNotFound):
        host.run("incident", "export", "out", "--entry", "00000000-0000-4000-8000-000000000000")
    assert not (host.folder / "out").exists()
    assert (host.folder / "incident-1" / "MANIFEST").exists()
