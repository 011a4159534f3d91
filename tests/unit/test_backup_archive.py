"""Archives of backups: read in pieces of any length, and nothing of them gets out of its folder."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.backup import BackupDamaged, BackupRefused
from service.backup.archive import Kept, Members, catching, pack, unpack, unpacking
from service.backup.configuration import Configuration, check_value
from service.backup.key import derive, read_secret
from service.settings import Settings
from tenants import merkle
from tenants.restored_log import Tree
from tests.backup_shelf import INSTALLATION

FILES = {
    "base/1/2": b"x" * 1000,
    "PG_VERSION": b"18\n",
    "empty": b"",
    "block": b"y" * 512,
    "backup_manifest": b"{}",
}


def write(archive: bytes, members: Members, step: int) -> None:
    with members:
        for start in range(0, len(archive), step):
            members.write(archive[start : start + step])
        members.finish()


@settings(max_examples=10, deadline=None)
@given(
    files=st.dictionaries(
        st.sampled_from(("a", "b", "c/d", "c/e", "f")), st.binary(max_size=1500), max_size=5
    ),
    step=st.integers(7, 1300),
)
def test_an_archive_reads_back_whatever_the_pieces(files: dict[str, bytes], step: int) -> None:
    found: dict[str, Kept] = {}
    write(pack(files), Members(lambda member: found.setdefault(member.name, Kept())), step)
    assert {name: kept.getvalue() for name, kept in found.items()} == files == unpack(pack(files))


def test_one_member_is_caught_as_it_passes_by(tmp_path: Path) -> None:
    kept = Kept()
    write(pack(FILES), Members(catching("backup_manifest", kept)), 700)
    assert kept.getvalue() == b"{}"


def test_files_are_unpacked_for_their_owner_alone(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, kind, mode in (("base", tarfile.DIRTYPE, 0o755), ("base/1", tarfile.REGTYPE, 0o4664)):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.size = kind, mode, 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"one"))
    write(out.getvalue(), Members(unpacking(tmp_path)), 100)
    assert (tmp_path / "base/1").read_bytes() == b"one"
    assert [(tmp_path / name).stat().st_mode & 0o7777 for name in ("base", "base/1")] == [0o700, 0o600]


@pytest.mark.parametrize("cut", [1, 511, 512, 1023, 1500])
def test_an_archive_that_ends_before_its_end_is_refused(cut: int) -> None:
    whole = pack(FILES)
    data = whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512 - cut] if cut > 1 else whole[:1]
    with pytest.raises(BackupDamaged):
        write(data, Members(lambda _member: None), 64)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../out", tarfile.REGTYPE),
        ("/etc/passwd", tarfile.REGTYPE),
        ("a/../../out", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("link", tarfile.LNKTYPE),
        ("device", tarfile.CHRTYPE),
        ("pipe", tarfile.FIFOTYPE),
        ("long", tarfile.GNUTYPE_LONGNAME),
    ],
)
def test_what_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc"
    data = member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    with pytest.raises(BackupDamaged):
        write(data, Members(unpacking(tmp_path)), 512)
    assert list(tmp_path.iterdir()) == []


def test_a_header_with_a_wrong_sum_is_refused() -> None:
    data = bytearray(pack(FILES))
    data[0] ^= 1
    with pytest.raises(BackupDamaged, match="header"):
        write(bytes(data), Members(lambda _member: None), 4096)


def test_a_configuration_reads_back_and_knows_its_secrets(tmp_path: Path) -> None:
    secrets = {"pepper": os.urandom(32), "master-key": os.urandom(32), "log-key": os.urandom(32)}
    for name, secret in secrets.items():
        (tmp_path / name).write_bytes(secret)
    checks = {name: check_value(secret) for name, secret in secrets.items()}
    written = Configuration(
        {"port": 8080}, checks, {"identities/i.toml": b"#"}, [{"name": "acme"}], "pericarp"
    )
    packed = written.pack()
    found = Configuration.unpack(packed)
    assert found == written
    assert not [secret for secret in secrets.values() if secret in packed or secret.hex().encode() in packed]
    found.refuse_other_secrets(tmp_path)
    (tmp_path / "pepper").write_bytes(os.urandom(32))
    with pytest.raises(BackupRefused, match="pepper is another installation's"):
        found.refuse_other_secrets(tmp_path)
    (tmp_path / "pepper").unlink()
    with pytest.raises(BackupRefused, match="pepper is not there"):
        found.refuse_other_secrets(tmp_path)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("false",), "status 1"),
        (("/nothing/there",), "cannot be run"),
        (("echo", "short"), "32 bytes"),
        (("echo", "zz" * 32), "32 bytes"),
    ],
    ids=["fails", "missing", "short", "not hex"],
)
def test_a_command_that_gives_no_key_is_refused(tmp_path: Path, command: tuple[str, ...], why: str) -> None:
    with pytest.raises(BackupRefused, match=why):
        read_secret(Settings(backup_key_command=command), tmp_path)


def test_a_key_comes_from_a_command_a_descriptor_or_a_file(tmp_path: Path) -> None:
    secret = os.urandom(32)
    assert read_secret(Settings(backup_key_command=("echo", secret.hex())), tmp_path) == secret
    reading, writing = os.pipe()
    os.write(writing, secret)
    os.close(writing)
    assert read_secret(Settings(backup_key_fd=reading), tmp_path) == secret
    with pytest.raises(BackupRefused, match="is not open"):
        read_secret(Settings(backup_key_fd=reading), tmp_path)
    (tmp_path / "secrets").mkdir()
    with pytest.raises(BackupRefused, match="backup-key is not there"):
        read_secret(Settings(), tmp_path)
    made = read_secret(Settings(), tmp_path, make=True)
    assert read_secret(Settings(), tmp_path) == made
    assert (tmp_path / "secrets" / "backup-key").stat().st_mode & 0o777 == 0o600


def test_what_seals_and_what_signs_are_two_keys_and_neither_is_the_secret() -> None:
    secret = os.urandom(32)
    key = derive(secret, INSTALLATION)
    assert len({secret, key.sealing, key.signer.key.public}) == 3
    assert derive(secret, INSTALLATION).signer.key == key.signer.key
    assert key.context("a", "b") != key.context("a\0b"[:1], "b", "")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 700))
def test_a_tree_that_grows_has_the_root_of_the_tiles(size: int) -> None:
    leaves = [merkle.hash_leaf(str(number).encode()) for number in range(size)]
    tree = Tree()
    for leaf in leaves:
        tree.add(leaf)
    tiles = merkle.grow(0, leaves, lambda _level, _number: b"")
    assert tree.root() == merkle.root(size, lambda level, number: tiles.get((level, number), b""))
