"""Backups as an operator makes them: by the command line, of a real Postgres, read back, and restored elsewhere."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.backup.workplace import alone
from tests.acceptance.service_process import REPOSITORY, environment
from tests.integration.backup_home import Home, backup_home

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def installed() -> Iterator[Home]:
    """With a full backup and one upon it, and entries that came before, between and after them.

    Its tests read it, or leave it as it was.
    """
    with backup_home() as home:
        first = home.backup("run")
        home.run("tenant", "create", "bcme")
        second = home.backup("run")
        assert (first["sequence"], first["kind"], first["why_full"]) == (1, "full", "the first one")
        assert (second["sequence"], second["kind"], second["parent"]) == (2, "incremental", 1)
        assert second["log_size"] > first["log_size"] > 0
        home.run("tenant", "create", "ccme")
        yield home


def log_of_installation(home: Home, operation: str) -> list[dict[str, Any]]:
    """The details of the entries of a backup command, newest first."""
    entries = home.run("audit", "query", "--operation", operation, "--json").told
    return [entry["body"]["details"] for entry in entries]


def test_a_backup_verifies_and_restores_on_a_host_that_has_only_the_secrets(installed: Home) -> None:
    verified = installed.backup("verify")
    assert (verified["sequence"], verified["backups_read"], verified["pruned"]) == (2, 2, 0)
    assert verified["bodies"] == verified["log_size"] > 0
    assert verified["compared"] == ["its own manifest", "the log as it is now"]
    (listed,) = (each for each in installed.backup("list") if each["sequence"] == 2)
    assert listed["verified_at"] is not None and listed["state"] == "kept"
    (entry,) = log_of_installation(installed, "admin.backup_verify")
    assert (entry["sequence"], entry["good"]) == (2, 1)
    assert not list((installed.home / "backup").glob("scratch-*")), "nothing is left of what was unpacked"

    with installed.lost() as elsewhere:
        restored = elsewhere.backup("restore")
        assert restored["sequence"] == 2
        assert [each["name"] for each in elsewhere.run("tenant", "list", "--json").told] == ["acme", "bcme"]
        assert (Path(restored["model"]) / "config.json").is_file()
        policies = json.loads((Path(restored["configuration"]) / "policies.json").read_text())
        assert sorted(each["name"] for each in policies) == ["acme", "bcme"]
        assert [each["sequence"] for each in elsewhere.backup("list")] == [1, 2]
        (entry,) = log_of_installation(elsewhere, "admin.backup_restore")
        assert entry["sequence"] == 2
        assert not (elsewhere.home / "backup" / "unpacked").exists()
        used = elsewhere.run("backup", "restore")
        assert (used.status, "has a database" in used.stderr) == (1, True)

        # What goes on from a backup is another history than what came after it: it does not pass for it.
        run = elsewhere.backup("run", PERICARP_BACKUP_STORE=str(elsewhere.home.parent / "own-store"))
        assert (run["kind"], run["sequence"]) == ("full", 3)


def test_an_entry_and_a_receipt_know_their_backup(installed: Home) -> None:
    entries = installed.run("audit", "query", "--operation", "admin.tenant_create", "--json").told
    backups = {entry["body"]["details"]["name"]: entry["backup"] for entry in entries}
    assert backups == {"acme": 1, "bcme": 2, "ccme": None}


def test_each_run_is_an_entry(installed: Home) -> None:
    newest, oldest = log_of_installation(installed, "admin.backup_run")
    assert (newest["sequence"], newest["kind"], oldest["sequence"], oldest["kind"]) == (
        2,
        "incremental",
        1,
        "full",
    )
    assert newest["stored_bytes"] < oldest["stored_bytes"]


def test_nothing_of_the_database_or_a_secret_is_readable_in_the_store(installed: Home) -> None:
    secrets = [path.read_bytes() for path in (installed.home / "secrets").iterdir()]
    for path in map(Path, installed.contents()):
        content = path.read_bytes()
        assert b"admin.tenant_create" not in content and b"PG_VERSION" not in content, path
        assert not [secret for secret in secrets if secret in content], path
        assert path.stat().st_mode & 0o077 == 0


def damaged(path: Path) -> Any:
    """The byte in the middle of an object is another one; undone afterwards by what is returned."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    return lambda: path.write_bytes(content)


@pytest.mark.parametrize(
    ("sequence", "part"), [(1, "database.000000"), (2, "configuration.000000"), (1, "manifest")]
)
def test_a_flipped_byte_ends_a_verify_and_loses_nothing(installed: Home, sequence: int, part: str) -> None:
    before = installed.contents()
    mend = damaged(installed.part(sequence, part))
    try:
        ended = installed.run("backup", "verify")
        assert (ended.status, "BackupDamaged" in ended.stderr) == (1, True), ended
    finally:
        mend()
    assert installed.contents().keys() == before.keys()
    newest = log_of_installation(installed, "admin.backup_verify")[0]
    assert (newest["sequence"], newest["good"]) == (2, 0), "that it failed is an entry"


def test_a_restore_that_was_cut_off_goes_on(installed: Home) -> None:
    mend = damaged(installed.part(2, "database.000000"))
    with installed.lost() as elsewhere:
        try:
            ended = elsewhere.run("backup", "restore")
            assert (ended.status, "BackupDamaged" in ended.stderr) == (1, True), ended
            assert not (elsewhere.home / "postgres" / "data").exists()
        finally:
            mend()
        first = elsewhere.home / "backup" / "unpacked" / f"{1:010d}" / "PG_VERSION"
        inode = first.stat().st_ino
        held = os.open(first, os.O_RDONLY)  # its number is not given to another file meanwhile
        try:
            restored = elsewhere.backup("restore")
            assert os.fstat(held).st_ino == inode
        finally:
            os.close(held)
        assert restored["sequence"] == 2


def test_another_key_and_other_secrets_are_refused_before_anything_is_changed(installed: Home) -> None:
    with installed.lost() as elsewhere:
        (elsewhere.home / "secrets" / "backup-key").write_bytes(os.urandom(32))
        ended = elsewhere.run("backup", "restore")
        assert (ended.status, "a manifest does not hold" in ended.stderr) == (1, True)
    with installed.lost() as elsewhere:
        (elsewhere.home / "secrets" / "pepper").write_bytes(os.urandom(32))
        ended = elsewhere.run("backup", "restore")
        assert (ended.status, "pepper is another installation's" in ended.stderr) == (1, True)
        (elsewhere.home / "secrets" / "master-key").unlink()
        (elsewhere.home / "secrets" / "pepper").unlink()
        ended = elsewhere.run("backup", "restore")
        assert (ended.status, "is not there" in ended.stderr) == (1, True)
        (elsewhere.home / "secrets" / "log-key").unlink()
        assert elsewhere.run("backup", "restore").status == 2
        assert not (elsewhere.home / "postgres" / "data").exists()


def test_a_store_that_was_rolled_back_is_found(installed: Home, tmp_path: Path) -> None:
    """Without its newest backup it is whole, and signed: only the database knows that there was another."""
    place = installed.part(2, "").parent / f"{2:010d}"
    shutil.move(place, tmp_path / "away")
    try:
        ended = installed.run("backup", "verify")
        assert (
            ended.status,
            "backup 2, which the database knows of, is not in the store" in ended.stderr,
        ) == (1, True)
        listed = installed.run("backup", "list", "--json")
        assert listed.status == 1
        assert [each["state"] for each in json.loads(listed.stdout)] == ["kept", "missing"]
    finally:
        shutil.move(tmp_path / "away", place)


def test_an_older_manifest_replayed_is_found(installed: Home) -> None:
    second = installed.part(2, "manifest")
    content = second.read_bytes()
    shutil.copy(installed.part(1, "manifest"), second)
    try:
        ended = installed.run("backup", "verify")
        assert (ended.status, "in the place of backup 2 is the manifest of 1" in ended.stderr) == (1, True)
    finally:
        second.write_bytes(content)


def test_a_backup_older_than_what_a_witness_holds_is_refused(installed: Home, tmp_path: Path) -> None:
    """On a host without the database a checkpoint that somebody kept stands for the log as it was."""
    export = tmp_path / "log.jsonl"
    assert installed.run("audit", "export", str(export)).status == 0
    kept = tmp_path / "checkpoint"
    kept.write_text(json.loads(export.read_text().splitlines()[0])["note"])
    with installed.lost() as elsewhere:
        assert elsewhere.run("backup", "verify").status == 2, "nothing to compare it with"
        ended = elsewhere.run("backup", "restore", "--checkpoint", str(kept))
        assert (ended.status, "it is an older one" in ended.stderr) == (1, True), ended


def test_two_commands_at_once_do_not_meet(installed: Home) -> None:
    before = installed.contents()
    with alone(installed.home):
        for command in ("run", "verify", "prune"):
            ended = installed.run("backup", command)
            assert (ended.status, "another backup command is at work" in ended.stderr) == (1, True)
    assert installed.contents() == before


def test_a_full_disk_ends_a_run_and_the_next_one_is_whole(installed: Home, tmp_path: Path) -> None:
    """No file may grow beyond a megabyte: what a store meets that has no room left."""
    store = tmp_path / "store"
    settings = environment(installed.home, PERICARP_BACKUP_STORE=str(store))
    ended = subprocess.run(
        [sys.executable, "-m", "service", "backup", "run", "--full"],
        cwd=REPOSITORY,
        env=settings,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, "StoreFailed" in ended.stderr) == (1, True), ended
    assert not list(store.rglob("manifest")), "a backup that was not finished is none"
    assert [each["sequence"] for each in installed.backup("list")] == [1, 2]


def test_usage_is_told_apart_from_doubt(installed: Home) -> None:
    assert installed.run("backup", "verify", "--sequence", "0").status == 2
    assert installed.run("backup", "verify", "--sequence", "17").status == 1
    assert installed.run("backup", "run", PERICARP_BACKUP_STORE="relative").status == 1
    assert installed.run("backup", "run", PERICARP_BACKUP_KEEP="0").status == 2
