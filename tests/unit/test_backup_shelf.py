"""Backups in a store: whatever is changed, cut, missing, moved or replayed there is found before it is believed."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service.backup import BackupDamaged, BackupRefused, StoreFailed
from service.backup import parts as parts_module
from service.backup.fetching import fetch_small
from service.backup.key import derive
from service.backup.manifest import PARTS, open_manifest, sign
from service.backup.model_files import check_model, keep_model, restore_model
from service.backup.shelf import BEGUN
from service.backup.store import open_store
from tests.backup_shelf import INSTALLATION, KEY, Small, read, small


def ignore(_count: int) -> None:
    """Nobody looks at the progress."""


def read_all(at: Small) -> None:
    """All that a verify reads of the newest backup before Postgres has a say. Raises what a verify raises."""
    newest = at.shelf.newest()
    if newest is None:
        raise BackupDamaged("no backup is left")
    for shelved in at.shelf.chain(newest):
        for name in PARTS:
            read(at.shelf, shelved, name)
        _configuration, model = fetch_small(at.shelf, shelved)
        check_model(at.shelf.store, at.shelf.key, model, ignore)


@pytest.fixture
def kept(tmp_path: Path) -> Small:
    """A full backup and one upon it, of a model of two files."""
    model = tmp_path / "checkpoint"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(100))
    at = small(tmp_path / "store")
    at.add(parent=at.add(model=model), model=model)
    read_all(at)
    return at


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 1 << 3
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [flip, truncate, lengthen, Path.unlink])
def test_harm_to_any_object_is_found(kept: Small, harm: Callable[[Path], None]) -> None:
    held = [path for path in kept.files() if path.name != BEGUN]
    assert len(held) == 2 * (len(PARTS) + 1) + 4
    for path in held:
        before = path.read_bytes()
        harm(path)
        if not path.exists() and path == kept.folder / kept.shelf.path(2, "manifest"):
            # To who sees the store alone, a run that was cut off. The database knows better (test_backup.py).
            path.write_bytes(before)
            continue
        with pytest.raises(BackupDamaged):
            read_all(kept)
        path.write_bytes(before)
    read_all(kept)


def test_another_key_opens_nothing(kept: Small) -> None:
    with pytest.raises(BackupDamaged, match="manifest"):
        read_all(small(kept.folder, derive(bytes(32), INSTALLATION)))


def test_backups_of_another_installation_are_not_seen_and_do_not_pass_for_ones_own(kept: Small) -> None:
    other = "f" * 32
    theirs = small(kept.folder, derive(bytes(range(32)), other))
    assert theirs.shelf.newest() is None
    shutil.copytree(kept.folder / INSTALLATION, kept.folder / other)
    with pytest.raises(BackupDamaged, match="manifest"):
        read_all(theirs)


def test_an_older_manifest_in_the_place_of_a_newer_one_is_found(kept: Small) -> None:
    first, second = (kept.folder / kept.shelf.path(sequence, "manifest") for sequence in (1, 2))
    shutil.copy(first, second)
    with pytest.raises(BackupDamaged, match="in the place of backup 2 is the manifest of 1"):
        kept.shelf.newest()


def test_an_older_backup_in_the_place_of_a_newer_one_is_found(kept: Small) -> None:
    first, second = (kept.folder / INSTALLATION / f"{sequence:010d}" for sequence in (1, 2))
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.raises(BackupDamaged, match="in the place of backup 2"):
        kept.shelf.newest()


def test_parts_of_two_backups_cannot_change_places(kept: Small) -> None:
    first, second = (kept.folder / kept.shelf.path(sequence, "database.000000") for sequence in (1, 2))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(BackupDamaged):
        read_all(kept)


def test_a_backup_upon_one_that_was_made_anew_is_refused(kept: Small) -> None:
    """Its parent's manifest is signed and in its place, and still another than it stood upon."""
    first = kept.shelf.find(1)
    assert first is not None
    path = kept.folder / kept.shelf.path(1, "manifest")
    path.unlink()
    path.write_bytes(sign(replace(first.manifest, made_at_us=2), KEY))
    newest = kept.shelf.newest()
    assert newest is not None
    with pytest.raises(BackupDamaged, match="stands upon another 1"):
        kept.shelf.chain(newest)


def test_a_manifest_reads_back_as_it_was_signed_and_in_no_other_way(kept: Small) -> None:
    newest = kept.shelf.newest()
    assert newest is not None
    assert open_manifest(newest.note, KEY) == newest.manifest
    for position in range(0, len(newest.note), 3):
        note = bytearray(newest.note)
        note[position] ^= 1
        with pytest.raises(BackupDamaged):
            open_manifest(bytes(note), KEY)


def test_nothing_is_ever_overwritten_and_a_lost_answer_is_no_error(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"), timeout_s=1.0)
    store.create("a/b", b"one")
    store.create("a/b", b"one")  # a put whose answer was lost is made again
    with pytest.raises(StoreFailed, match="never overwritten"):
        store.create("a/b", b"two")
    assert store.read("a/b") == b"one"
    assert store.read("a/c") is None
    assert store.sizes("a") == {"a/b": 3}
    store.remove(["a/b", "a/c"])
    assert store.sizes("a") == {}
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("location", [None, "backups", "ftp://host/backups", "s3:///nothing"])
def test_a_store_that_cannot_be_is_refused(location: str | None) -> None:
    with pytest.raises(BackupRefused, match="PERICARP_BACKUP_STORE"):
        open_store(location, timeout_s=1.0)


def test_one_number_is_taken_by_one_run(kept: Small) -> None:
    kept.shelf.take(3, "one")
    kept.shelf.take(3, "one")
    with pytest.raises(BackupRefused, match="another run is making backup 3"):
        kept.shelf.take(3, "two")
    newest = kept.shelf.newest()
    assert newest is not None and newest.sequence == 2, "one that was not finished is none"


def test_a_part_of_many_objects_reads_back(kept: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "OBJECT_BYTES", 500)
    shelved = kept.add()
    names = [
        path.name for path in kept.files() if path.name.startswith("database.0") and "0000000003" in str(path)
    ]
    assert len(names) == -(-shelved.manifest.part("database").size_bytes // 500) > 2
    assert read(kept.shelf, shelved, "database") == b"what Postgres wrote" * 100
    (kept.folder / kept.shelf.path(3, "database.000001")).unlink()
    with pytest.raises(BackupDamaged, match=r"database\.000001 is missing"):
        read(kept.shelf, shelved, "database")


def test_a_models_files_are_stored_once_and_come_back_with_their_modes(tmp_path: Path) -> None:
    model = tmp_path / "checkpoint"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "weights.safetensors").write_bytes(os.urandom(100_000))
    (model / "config.json").chmod(0o640)
    at = small(tmp_path / "store")
    kept = keep_model(at.shelf.store, KEY, str(model), ignore)
    stored = {path: path.stat().st_mtime_ns for path in at.files()}
    assert keep_model(at.shelf.store, KEY, str(model), ignore) == kept
    assert {path: path.stat().st_mtime_ns for path in at.files()} == stored
    digest = hashlib.sha256(b"{}").hexdigest()
    (
        tmp_path / "store" / INSTALLATION / "models" / digest / "whole"
    ).unlink()  # as a run leaves it that is cut off
    assert keep_model(at.shelf.store, KEY, str(model), ignore) == kept
    restore_model(at.shelf.store, KEY, kept, tmp_path / "restored", ignore)
    for path in ("config.json", "sub/weights.safetensors"):
        assert (tmp_path / "restored" / path).read_bytes() == (model / path).read_bytes()
        assert (tmp_path / "restored" / path).stat().st_mode == (model / path).stat().st_mode
    assert not list((tmp_path / "restored").rglob("*.draft"))
