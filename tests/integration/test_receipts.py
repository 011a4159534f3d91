"""Receipts, as whoever got an answer asks for them: over HTTP, verified by a program that shares no code with us."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from tenants import merkle
from tenants.access import Role, Scope
from tenants.backups import Made
from tenants.checkpoint import Proof, open_checkpoint
from tenants.envelope import ENVELOPE_BYTES, Envelope
from tenants.sequencer import log_signer
from tests.integration.conftest import Secrets
from tests.integration.served import Served, until

VERIFY = Path(__file__).resolve().parents[2] / "tools" / "verify.py"
ASK = {"query": "red fruit", "documents": ["a blue car", "strawberry"]}


@pytest.fixture
def vkey(installation_secrets: Secrets) -> str:
    """The log's public key, as `audit key` prints it."""
    return log_signer(installation_secrets.log_key).key.text


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`tools/verify.py`, by an interpreter that finds none of our packages."""
    return subprocess.run(
        [sys.executable, "-I", str(VERIFY), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


def fetch(service: Served, key: str, receipt: str, path: str = "/v1/receipts/") -> httpx.Response:
    """The receipt once it is there."""
    answers: list[httpx.Response] = []

    def integrated() -> bool:
        with service.client(key) as client:
            answers.append(client.get(path + receipt))
        return answers[-1].status_code != 404 or answers[-1].json()["code"] != "receipt_pending"

    until(integrated)
    return answers[-1]


def admin_key(service: Served, name: str, role: Role, scopes: list[Scope] | None = None) -> str:
    async def make() -> str:
        tenant = await service.desk.directory.find_tenant(name)
        return (await service.desk.directory.keys.create(tenant.id, role, scopes=scopes))[1]

    return service.wait(make())


def test_an_answers_receipt_proves_its_entry_to_a_program_of_its_own(
    service: Served, vkey: str, tmp_path: Path
) -> None:
    name, key = service.search_key()
    answer = service.rerank(ASK, key)
    assert answer.status_code == 200
    receipt = answer.headers["pericarp-receipt"]
    told = fetch(service, key, receipt)
    assert told.status_code == 200
    assert told.headers["content-type"] == "text/plain; charset=utf-8"
    file = tmp_path / "answer.tlog-proof"
    file.write_bytes(told.content)
    done = verify("receipt", file, "--key", vkey, "--id", receipt)
    assert done.returncode == 0, done.stderr
    assert f"request {answer.json()['id']}" in done.stdout
    (recorded,) = service.wait(recorded_of(service, name))
    (tmp_path / "body").write_bytes(recorded)
    done = verify("receipt", file, "--key", vkey, "--id", receipt, "--body", tmp_path / "body")
    assert done.returncode == 0, done.stderr
    (tmp_path / "body").write_bytes(recorded.replace(b'"status":200', b'"status":201'))
    done = verify("receipt", file, "--key", vkey, "--body", tmp_path / "body")
    assert done.returncode == 1 and "the body is not the one that was recorded" in done.stderr


async def recorded_of(service: Served, name: str) -> list[bytes]:
    tenant = await service.desk.directory.find_tenant(name)
    return [each.body for each in await service.desk.audit.list_entries(tenant.id)]


def test_a_refusal_has_a_receipt_as_well(service: Served, vkey: str, tmp_path: Path) -> None:
    _, key = service.search_key()
    answer = service.rerank({"query": ""}, key)
    assert answer.status_code == 422
    file = tmp_path / "refusal.tlog-proof"
    file.write_bytes(fetch(service, key, answer.headers["pericarp-receipt"]).content)
    assert verify("receipt", file, "--key", vkey).returncode == 0


def test_a_receipt_says_which_backup_is_the_first_to_have_its_entry(service: Served) -> None:
    name, key = service.search_key()
    auditor = admin_key(service, name, Role.AUDITOR)
    receipt = service.rerank(ASK, key).headers["pericarp-receipt"]
    told = fetch(service, key, receipt)
    assert told.headers["pericarp-backup"] == "none"
    place = Proof.parse(told.text).index

    async def note() -> None:
        for sequence, log_size in ((7, place), (8, place + 1), (9, place + 2)):
            await service.desk.backups.note(
                Made(sequence, uuid.uuid4(), "full", None, log_size, 1, bytes(32))
            )

    service.wait(note())
    assert fetch(service, key, receipt).headers["pericarp-backup"] == "8"
    assert fetch(service, auditor, receipt, "/audit/v1/receipts/").headers["pericarp-backup"] == "8"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace("index ", "index 1", 1), "is not below the tree's size"),
        (lambda text: text.replace("extra ", "extra AAAA", 1), "not in the tree"),
        (lambda text: text.replace("pericarp/log/", "pericarp/lag/"), "it is of the log"),
        (lambda text: text[: text.rindex("— ")], "not a signed checkpoint"),
    ],
    ids=["index", "leaf", "origin", "signature"],
)
def test_a_receipt_that_was_changed_is_refused(
    service: Served, vkey: str, tmp_path: Path, change: object, complaint: str
) -> None:
    _, key = service.search_key()
    service.rerank(ASK, key)
    text = fetch(service, key, service.rerank(ASK, key).headers["pericarp-receipt"]).text
    assert callable(change)
    file = tmp_path / "changed.tlog-proof"
    file.write_text(change(text))
    done = verify("receipt", file, "--key", vkey)
    assert done.returncode == 1, done.stdout
    assert complaint in done.stderr


def test_a_receipt_of_another_log_is_refused(service: Served, tmp_path: Path) -> None:
    _, key = service.search_key()
    file = tmp_path / "receipt.tlog-proof"
    file.write_bytes(fetch(service, key, service.rerank(ASK, key).headers["pericarp-receipt"]).content)
    assert verify("receipt", file, "--key", log_signer(bytes(32)).key.text).returncode == 1
    assert verify("receipt", file, "--key", "no key").returncode == 2


def test_anothers_receipt_is_the_same_404_as_one_that_never_was(service: Served) -> None:
    _, mine = service.search_key()
    _, theirs = service.search_key()
    receipt = service.rerank(ASK, mine).headers["pericarp-receipt"]
    assert fetch(service, mine, receipt).status_code == 200

    def complaint(asked: str) -> dict[str, object]:
        with service.client(theirs) as client:
            answer = client.get(f"/v1/receipts/{asked}")
        told: dict[str, object] = answer.json()
        told.pop("request_id")
        told.pop("instance", None)
        return {**told, "status": answer.status_code}

    never = complaint(str(uuid.uuid4()))
    assert (never["status"], never["code"]) == (404, "receipt_not_found")
    assert complaint(receipt) == never
    assert complaint(receipt.upper()) == complaint("none") == never


def test_what_is_not_in_the_tree_yet_says_when_to_come_back(service: Served) -> None:
    """An entry of a tenant whose leaf the test keeps from the tree, by the sequencer's own lock."""
    name, key = service.search_key()

    async def ask_while_locked() -> httpx.Response:
        async with service.desk.database.calls() as connection:
            while not (await connection.fetchrow("select * from pericarp.begin_integration(1)"))["locked"]:  # type: ignore[index]
                pass
            await connection.execute("set local idle_in_transaction_session_timeout = 0")
            async with httpx.AsyncClient(
                base_url=service.url, headers={"Authorization": f"Bearer {key}"}, timeout=30
            ) as client:
                receipt = (await client.post("/v1/rerank", json=ASK)).headers["pericarp-receipt"]
                return await client.get(f"/v1/receipts/{receipt}")

    pending = service.wait(ask_while_locked())
    assert (pending.status_code, pending.json()["code"]) == (404, "receipt_pending")
    assert pending.headers["retry-after"] == "1"
    assert [entry["operation"] for entry in service.entries(name)] == ["rerank"]  # asking too early is none


def test_an_auditor_checks_its_own_tenants_receipts_and_the_newest_checkpoint(
    service: Served, vkey: str, tmp_path: Path, installation_secrets: Secrets
) -> None:
    name, key = service.search_key()
    receipt = service.rerank(ASK, key).headers["pericarp-receipt"]
    auditor = admin_key(service, name, Role.AUDITOR)
    told = fetch(service, auditor, receipt, "/audit/v1/receipts/")
    file = tmp_path / "receipt.tlog-proof"
    file.write_bytes(told.content)
    assert verify("receipt", file, "--key", vkey, "--id", receipt).returncode == 0
    with service.client(auditor) as client:
        note = client.get("/audit/v1/checkpoint").text
        assert client.get("/audit/v1/tile/0/000.p/1").status_code == 403
    signer = log_signer(installation_secrets.log_key)
    opened = open_checkpoint(note, [signer.key], origin=signer.key.name)
    assert opened.checkpoint.size > Proof.parse(told.text).index
    with service.client(key) as client:  # a key of the data plane is unknown on the admin plane
        assert client.get("/audit/v1/checkpoint").status_code == 401
    with service.client("") as client:
        assert client.get("/audit/v1/checkpoint").status_code == 401
        assert client.get(f"/v1/receipts/{receipt}").status_code == 401


def test_the_platforms_auditor_builds_every_proof_from_tiles(
    service: Served, installation_secrets: Secrets
) -> None:
    name, key = service.search_key()
    for _ in range(3):
        last = service.rerank(ASK, key).headers["pericarp-receipt"]
    fetch(service, key, last)
    auditor = admin_key(service, name, Role.PLATFORM_ADMIN, [Scope.AUDIT])
    signer = log_signer(installation_secrets.log_key)
    with service.client(auditor) as client:
        note = client.get("/audit/v1/checkpoint").text
        checkpoint = open_checkpoint(note, [signer.key], origin=signer.key.name).checkpoint
        size = checkpoint.size
        assert size < 256, "this test reads one tile"
        tile = client.get(f"/audit/v1/tile/0/000.p/{size}")
        bundle = client.get(f"/audit/v1/tile/entries/000.p/{size}").content
        assert merkle.root(size, lambda level, number: tile.content) == checkpoint.root
        assert tile.headers["content-type"] == "application/octet-stream"
        leaves = []
        while bundle:
            length = int.from_bytes(bundle[:2], "big")
            assert length == ENVELOPE_BYTES
            leaves.append(bundle[2 : 2 + length])
            bundle = bundle[2 + length :]
        assert [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves] == [
            tile.content[at : at + 32] for at in range(0, len(tile.content), 32)
        ]
        assert last in {str(Envelope.parse(leaf).id) for leaf in leaves}
        for path in (
            *("0/000", "0/001", "1/000", "64/000", "00/000", "0/000.p/0", "0/000.p/256", "0/0", "0/x000/000"),
            *(
                "entries/000",
                "entries/001",
                "entries/000.p/255",
                "x/000",
                "entries/x999/x999/x999/x999/x999/999",
                "0/000.p/01",
                "-1/000",
            ),
        ):
            assert client.get(f"/audit/v1/tile/{path}").status_code == 404, path


def test_readiness_and_metrics_tell_of_the_log(service: Served) -> None:
    _, key = service.search_key()
    fetch(service, key, service.rerank(ASK, key).headers["pericarp-receipt"])
    with service.client() as client:
        assert client.get("/readyz").json()["checks"]["log"] is True
        metrics = client.get("/metrics").text
    told = dict(line.split() for line in metrics.splitlines() if line.startswith("pericarp_log_"))
    assert float(told["pericarp_log_size"]) > 0
    assert float(told["pericarp_log_lag_seconds"]) >= 0
