"""Log files: one a day, another where it is full, gone after their days, and never anybody else's."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.watch.log_folder import LogFolder, LogFolderUnusable

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
DAY_S = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now_s = NOON

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def open_folder(folder: Path, clock: Clock, file_bytes: int = 100, days: int = 3) -> LogFolder:
    return LogFolder(folder, file_bytes=file_bytes, retention_days=days, clock=clock)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_day_has_a_file_of_its_own_that_only_its_owner_reads(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "logs"
    write = open_folder(folder, clock)
    write(b"one\n")
    clock.now_s += DAY_S
    write(b"two\n")
    assert names(folder) == ["gateway-2026-03-01.jsonl", "gateway-2026-03-02.jsonl"]
    assert (folder / "gateway-2026-03-02.jsonl").read_bytes() == b"two\n"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_that_is_full_is_followed_by_another_also_after_a_start(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "logs"
    for _start in range(2):
        write = open_folder(folder, clock)
        for _ in range(3):
            write(b"x" * 59 + b"\n")
        write.close()
    assert [(folder / name).stat().st_size for name in names(folder)] == [120, 120, 120]


def test_files_are_deleted_after_their_days_by_the_day_in_their_name(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "logs"
    folder.mkdir(mode=0o700)
    strangers = ["gateway-2020-01-01.jsonl.bak", "postgres.log", "gateway-old.jsonl"]
    for name in [
        "gateway-2026-02-26.jsonl",
        "gateway-2026-02-26.7.jsonl",
        "gateway-2026-02-27.jsonl",
        *strangers,
    ]:
        (folder / name).touch(0o600)
    write = open_folder(folder, clock, days=3)
    kept = ["gateway-2026-02-27.jsonl", "gateway-2026-03-01.jsonl"]
    assert names(folder) == sorted([*kept, *strangers])
    clock.now_s += 2 * DAY_S
    write(b"later\n")
    assert names(folder) == sorted(["gateway-2026-03-01.jsonl", "gateway-2026-03-03.jsonl", *strangers])


def test_two_gateways_share_a_file(tmp_path: Path, clock: Clock) -> None:
    one, other = open_folder(tmp_path / "logs", clock), open_folder(tmp_path / "logs", clock)
    one(b"1\n")
    other(b"2\n")
    one(b"3\n")
    assert (tmp_path / "logs" / "gateway-2026-03-01.jsonl").read_bytes() == b"1\n2\n3\n"


def test_a_line_that_was_torn_does_not_spoil_the_next(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = open_folder(tmp_path / "logs", clock)
    whole, torn = os.write, iter([3])

    def full(fd: int, data: bytes) -> int:
        for count in torn:
            return whole(fd, data[:count])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("service.watch.log_folder.os.write", full)
        with pytest.raises(OSError, match="No space"):
            write(b"first line\n")
    write(b"second line\n")
    assert (tmp_path / "logs" / "gateway-2026-03-01.jsonl").read_bytes() == b"fir\nsecond line\n"


def test_what_is_not_ours_alone_is_refused(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "open").mkdir(mode=0o700)
    (tmp_path / "open").chmod(0o750)
    with pytest.raises(LogFolderUnusable, match="open to others"):
        open_folder(tmp_path / "open", clock)
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(LogFolderUnusable, match="something else"):
        open_folder(tmp_path / "link", clock)
    (tmp_path / "elsewhere").touch(0o600)
    (tmp_path / "real" / "gateway-2026-03-01.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LogFolderUnusable):
        open_folder(tmp_path / "real", clock)
    assert (tmp_path / "elsewhere").read_bytes() == b""
    (tmp_path / "file").touch()
    with pytest.raises(LogFolderUnusable):
        open_folder(tmp_path / "file", clock)
