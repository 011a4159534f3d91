"""The embedded Postgres through cold and warm starts, kills, leftovers and foreign eyes: real binaries, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from tenants.embedded import DataUnusable, EmbeddedError, Server, StartFailed, WrongOwner, erase, running
from tenants.postgres_account import carried_binaries

REPOSITORY = Path(__file__).parents[2]
ROOT = os.geteuid() == 0
SPARE = shutil.ignore_patterns("include", "__pycache__")
HOLD = """
import sys
from pathlib import Path
from tenants.embedded import running
with running(Path(sys.argv[1])) as server:
    print(server.pid, server.superuser_url, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that everybody may cross, unlike pytest's own: what most installations look like."""
    directory = Path(tempfile.mkdtemp(prefix="embedded-"))
    directory.chmod(0o755)
    yield directory
    for home in [path.parents[1] for path in directory.glob("**/postgres/location")]:
        erase(home)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def warm() -> Iterator[Path]:
    """One home, initialised once; its tests leave it in working order, and that is what they test."""
    directory = Path(tempfile.mkdtemp(prefix="embedded-"))
    directory.chmod(0o755)
    home = directory / "Ünser Heim"
    with running(home) as server:
        sql(server, "create table kept (word text)")
    yield home
    erase(home)
    shutil.rmtree(directory)


def sql(server: Server | str, statement: str, **connect: Any) -> Any:
    """The statement's first value, over a connection of its own."""

    async def ask() -> Any:
        url = server if isinstance(server, str) else server.superuser_url
        connection = await asyncpg.connect(url, **connect)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(ask())


@contextlib.contextmanager
def holder(home: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that claims the server, and the pid of the Postgres that it got."""
    process = start_holder(home)
    try:
        assert process.stdout is not None
        answer = process.stdout.readline().split()
        assert answer, "the other process got no server"
        yield process, int(answer[0])
    finally:
        end(process)


def start_holder(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> int:
    process.communicate("\n" if process.poll() is None else None, timeout=30)
    return process.returncode


def eventually(condition: Callable[[], bool], patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "did not come to pass"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and parent(int(entry.name)) == pid:
                found.append(int(entry.name))
    return found


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# --- starting and sharing ---------------------------------------------------------------------------------------


def test_the_server_is_private_durable_and_checksummed(warm: Path) -> None:
    with running(warm, settings={"max_connections": "17"}) as server:
        expected = {
            "data_checksums": "on",
            "fsync": "on",
            "full_page_writes": "on",
            "listen_addresses": "",
            "jit": "off",
            "server_encoding": "UTF8",
            "max_connections": "17",
            "log_statement": "none",
            "log_min_error_statement": "panic",
            "unix_socket_permissions": "0700",
        }
        assert {name: sql(server, f"show {name}") for name in expected} == expected
        assert (
            sql(server, "select datlocprovider::text || datlocale from pg_database where datname='postgres'")
            == "bC.UTF-8"
        )
        assert sql(server, "select current_user") == "postgres"
        assert server.data_directory == warm / "postgres" / "data"
        pid = server.pid
    assert not alive(pid)


def test_a_second_start_finds_the_data_of_the_first(warm: Path) -> None:
    with running(warm) as server:
        sql(server, "insert into kept values ('first')")
        first = server.pid
    with running(warm) as server:
        assert server.pid != first
        assert sql(server, "select count(*) from kept where word = 'first'") == 1


def test_a_second_process_attaches_and_leaves_without_stopping_it(warm: Path) -> None:
    with running(warm) as server:
        with holder(warm) as (_, pid):
            assert pid == server.pid
        assert server.pid == pid
        assert sql(server, "select 1") == 1


def test_the_server_outlives_the_process_that_started_it_while_another_needs_it(warm: Path) -> None:
    with holder(warm) as (starter, pid):
        with running(warm) as server:
            assert end(starter) == 0
            assert server.pid == pid
            assert sql(server, "select 1") == 1
        assert not alive(pid)


def test_claims_of_one_process_are_independent(warm: Path) -> None:
    with running(warm) as outer:
        with running(warm) as inner:
            assert inner == outer
        assert sql(outer, "select 1") == 1


def test_it_may_be_claimed_in_a_thread_that_ends(warm: Path) -> None:
    """A parent-death signal belongs to the thread that forked: it must not take the server along."""
    claims = contextlib.ExitStack()
    servers: list[Server] = []
    thread = threading.Thread(target=lambda: servers.append(claims.enter_context(running(warm))))
    thread.start()
    thread.join()
    with claims:
        time.sleep(0.3)
        assert sql(servers[0], "select 1") == 1


def test_concurrent_first_starts_share_one_server(base: Path) -> None:
    home = base / "a, b: c@d"  # what clients would take for a list, a port, an abstract socket
    processes = [start_holder(home) for _ in range(3)]
    try:
        answers = {process.stdout.readline() for process in processes if process.stdout}
        assert len(answers) == 1
        pid, url = answers.pop().split()
        assert sql(url, "select 1") == 1
    finally:
        assert [end(process) for process in processes] == [0, 0, 0]
    assert not alive(int(pid))


def test_ambient_postgres_variables_change_nothing(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PGPORT": "6000",
        "PGHOST": "/nowhere",
        "PGDATA": "/nowhere",
        "PGOPTIONS": "-c jit=on",
    }.items():
        monkeypatch.setenv(name, value)
    with running(warm) as server:
        monkeypatch.delenv("PGOPTIONS")
        assert sql(server, "show jit") == "off"


# --- kills and leftovers ----------------------------------------------------------------------------------------


def test_killing_the_only_holder_stops_the_server_and_loses_nothing(warm: Path) -> None:
    with holder(warm) as (process, pid):
        with running(warm) as server:
            sql(server, "insert into kept values ('before the kill')")
        process.kill()
        eventually(lambda: not alive(pid))
    with running(warm) as server:
        assert sql(server, "select count(*) from kept where word = 'before the kill'") == 1


def test_an_orphaned_server_is_found_and_stopped_first(warm: Path) -> None:
    """Holder and guardian killed, and the postmaster hung, so that no death signal reaches it: the worst orphan."""
    with holder(warm) as (process, pid), running(warm) as server:
        sql(server, "insert into kept values ('orphaned')")
        guardian = parent(pid)
        os.kill(pid, signal.SIGSTOP)
        os.kill(guardian, signal.SIGKILL)
        process.kill()
        process.wait()
    assert alive(pid)
    with running(warm) as server:
        assert not alive(pid)
        assert server.pid != pid
        assert sql(server, "select count(*) from kept where word = 'orphaned'") == 1


def test_postgres_goes_down_with_its_guardian_and_comes_back_at_the_next_claim(warm: Path) -> None:
    with running(warm) as server:
        pid = server.pid
        os.kill(parent(pid), signal.SIGKILL)
        eventually(lambda: not alive(pid))
        with running(warm) as again:
            assert again.socket_directory == server.socket_directory
            assert sql(server, "select 1") == 1


def test_a_killed_postmaster_is_started_again_at_the_same_address(warm: Path) -> None:
    with running(warm) as server:
        sql(server, "insert into kept values ('committed')")
        pid = server.pid
        os.kill(pid, signal.SIGKILL)

        def answers() -> bool:
            with contextlib.suppress(OSError, asyncpg.PostgresError, EmbeddedError):
                return server.pid != pid and sql(server, "select 1") == 1
            return False

        eventually(answers)
        assert sql(server, "select count(*) from kept where word = 'committed'") == 1


def test_a_stale_pid_file_with_somebody_elses_pid_is_seen_through(warm: Path) -> None:
    with running(warm) as server:
        data = server.data_directory
    owner = data.stat()
    who = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if ROOT else {}
    bystander = subprocess.Popen(["/bin/sleep", "60"], cwd="/", **who)  # type: ignore[call-overload]
    try:
        (data / "postmaster.pid").write_text(f"{bystander.pid}\n{data}\n1\n5432\n\n\n  1 1\nready   \n")
        os.chown(data / "postmaster.pid", owner.st_uid, owner.st_gid)
        with running(warm) as server:
            assert server.pid != bystander.pid
            assert sql(server, "select 1") == 1
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_half_made_cluster_is_thrown_away_and_made_again(base: Path) -> None:
    home = base / "home"
    process = start_holder(home)
    eventually(lambda: any(home.glob("postgres/draft-*/base")))
    process.kill()
    process.communicate()
    assert not (home / "postgres" / "data").exists()
    assert any(home.glob("postgres/draft-*"))
    with running(home) as server:
        assert sql(server, "select 1") == 1
    assert not any(home.glob("postgres/draft-*"))


def test_lost_data_is_reported_and_not_replaced_by_an_empty_database(warm: Path) -> None:
    data = warm / "postgres" / "data"
    data.rename(data.with_name("elsewhere"))
    with pytest.raises(DataUnusable, match="is gone: restore it"), running(warm):
        pass
    data.with_name("elsewhere").rename(data)
    secret = warm / "secrets" / "postgres-superuser"
    secret.rename(secret.with_name("elsewhere"))
    with pytest.raises(DataUnusable, match="is gone: restore it"), running(warm):
        pass
    secret.with_name("elsewhere").rename(secret)
    with running(warm) as server:
        assert sql(server, "select 1") == 1


def test_data_of_another_major_version_is_refused_untouched(warm: Path) -> None:
    version = warm / "postgres" / "data" / "PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(DataUnusable, match=r"of Postgres 17.*binaries are of 18.*pg_upgrade"), running(warm):
        pass
    assert version.read_text() == "17\n"
    version.write_text("18\n")


def test_a_start_that_fails_says_why_and_leaves_nothing_behind(warm: Path) -> None:
    began = time.monotonic()
    reason = r"invalid value for parameter \"shared_buffers\""
    with pytest.raises(StartFailed, match=reason), running(warm, settings={"shared_buffers": "plenty"}):
        pass
    assert time.monotonic() - began < 30  # not the patience for a slow start
    with running(warm) as server:
        assert sql(server, "select 1") == 1


@pytest.mark.parametrize("name", ["listen_addresses", "Unix-Socket-Permissions", "hba_file"])
def test_what_keeps_it_private_cannot_be_set(warm: Path, name: str) -> None:
    with pytest.raises(EmbeddedError, match="cannot be set"), running(warm, settings={name: "x"}):
        pass


# --- foreign eyes -----------------------------------------------------------------------------------------------


def test_directories_socket_and_secret_are_private(warm: Path) -> None:
    with running(warm) as server:
        assert mode(server.data_directory) == 0o700
        assert mode(server.socket_directory) == 0o700
        assert mode(warm / "secrets") == mode(warm / "logs") == 0o700
        assert mode(warm / "secrets" / "postgres-superuser") == mode(server.log) == 0o600
        if ROOT:
            account = server.data_directory.stat().st_uid
            assert (
                account not in {entry.pw_uid for entry in pwd.getpwall()}
                or pwd.getpwuid(account).pw_name == "pericarp"
            )
            for path in (server.data_directory, server.socket_directory, server.log.parent, warm / "secrets"):
                looking = subprocess.run(
                    ["/bin/ls", path], capture_output=True, user=65534, group=65534, extra_groups=[]
                )
                assert looking.returncode != 0
            assert Path(f"/proc/{server.pid}").stat().st_uid == server.data_directory.stat().st_uid
            status = Path(f"/proc/{server.pid}/status").read_text()
            assert "\nGroups:\t \n" in status or "\nGroups:\t\n" in status
            assert "\nCapEff:\t0000000000000000\n" in status


def test_nobody_gets_in_without_the_password(warm: Path) -> None:
    with running(warm) as server:
        with pytest.raises(asyncpg.InvalidPasswordError):
            sql(server, "select 1", password="wrong")
        with pytest.raises(asyncpg.InvalidPasswordError):
            sql(server, "select 1", password="")
        rules = (server.data_directory / "pg_hba.conf").read_text().splitlines()
        methods = {rule.split()[-1] for rule in rules if rule.strip() and not rule.startswith("#")}
        assert methods == {"scram-sha-256"}


def test_the_password_shows_nowhere_but_in_its_file(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERICARP_SECRET", "an-inherited-secret")
    with running(warm) as server:
        password = urlsplit(server.superuser_url).password or ""
        assert len(password) >= 43  # 256 bits
        assert password not in repr(server)
        assert server.superuser_url not in repr(server)
        with contextlib.suppress(asyncpg.PostgresError):
            sql(server, "select 'my private words'::int")
        processes = [server.pid, parent(server.pid), *children(server.pid)]
        assert len(processes) > 4
        for pid in processes:
            for name in ("cmdline", "environ"):
                try:
                    seen = Path(f"/proc/{pid}/{name}").read_bytes()
                except OSError:  # a backend that was just ending, and nothing else
                    eventually(functools.partial(lambda ending: not alive(ending), pid))
                    continue
                assert password.encode() not in seen
                assert b"an-inherited-secret" not in seen
        log = server.log.read_text()
        assert password not in log
        assert "select" not in log
    pages = [path for path in server.data_directory.rglob("*") if path.is_file()]
    assert not any(password.encode() in path.read_bytes() for path in pages)


@pytest.mark.skipif(not ROOT, reason="only root can make a directory that Postgres cannot enter")
def test_root_keeps_data_and_binaries_outside_what_only_root_may_enter(
    base: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    locked = base / "locked"
    locked.mkdir(mode=0o700)
    package = carried_binaries().parents[1]
    for source in (package, package.with_name(package.name + ".libs")):
        shutil.copytree(source, locked / source.name, ignore=SPARE, copy_function=link_or_copy)
    monkeypatch.syspath_prepend(locked)
    before = {path: path.stat().st_mode for path in (base, locked, locked / package.name)}
    home, outside = locked / "home", base / "outside"
    umask = os.umask(0o077)  # as hardened hosts have it
    request.addfinalizer(functools.partial(os.umask, umask))
    with running(home, outside=outside) as server:
        assert server.data_directory.parents[1] == outside
        assert mode(outside) == mode(server.data_directory.parent) == 0o711
        assert server.data_directory.parent.stat().st_uid == 0
        program = Path(os.readlink(f"/proc/{server.pid}/exe"))
        assert program.is_relative_to(outside)
        assert program.stat().st_uid == 0
        assert mode(program) == 0o555
        sql(server, "create table kept ()")
        data = server.data_directory
    copied = program.stat()
    with running(home, outside=outside) as server:
        assert server.data_directory == data
        assert sql(server, "select count(*) from kept") == 0
        assert program.stat().st_ino == copied.st_ino
    assert {path: path.stat().st_mode for path in before} == before
    erase(home)
    assert not data.parent.exists()


@pytest.mark.skipif(not ROOT, reason="needs two users")
def test_a_home_of_another_user_is_refused(base: Path) -> None:
    home = base / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    with pytest.raises(WrongOwner, match="run as that user"), running(home):
        pass


def test_a_home_with_a_path_too_long_for_a_socket_works(warm: Path) -> None:
    """Moved there, too: nothing that is recorded may hold the old path."""
    deep = warm.parent / ("é" * 60)
    deep.mkdir()
    moved = warm.rename(deep / "home")
    try:
        for _ in range(2):
            with running(moved) as server:
                assert len(os.fsencode(server.socket_directory)) < 86
                assert mode(server.socket_directory) == 0o700
                assert server.data_directory.is_relative_to(moved)
                assert sql(server, "select count(*) from kept") is not None
    finally:
        moved.rename(warm)
        deep.rmdir()
    with running(warm) as server:
        assert server.socket_directory == warm / "postgres" / "socket"


def test_a_copied_home_gets_a_server_and_a_socket_of_its_own(base: Path) -> None:
    home, copy = base / ("é" * 60) / "home", base / ("é" * 60) / "copy"
    with running(home) as server:
        sql(server, "create table kept ()")
    subprocess.run(["/bin/cp", "-a", home, copy], check=True)
    with running(home) as server, running(copy) as other:
        assert server.pid != other.pid
        assert server.socket_directory != other.socket_directory
        sql(other, "drop table kept")
        assert sql(server, "select count(*) from kept") == 0


@pytest.mark.skipif(not ROOT, reason="already ran as an ordinary user")
def test_an_ordinary_user_runs_it_as_itself(base: Path) -> None:
    """One without a passwd entry, as in many containers; what is ours may be out of its reach, so it gets copies."""
    uid = 60001
    python = next(
        (path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(path).exists()), None
    )
    recent = "import sys; sys.exit(sys.version_info < (3, 11))"
    if python is None or subprocess.run([python, "-c", recent]).returncode != 0:
        pytest.skip("no Python that an ordinary user may run")
    packages = base / "packages"
    package = carried_binaries().parents[1]
    for source in (package, package.with_name(package.name + ".libs"), REPOSITORY / "tenants"):
        shutil.copytree(source, packages / source.name, ignore=SPARE, copy_function=link_or_copy)
    own = base / "own place"
    own.mkdir(mode=0o700)
    os.chown(own, uid, uid)
    process = subprocess.Popen(
        [python, "-c", HOLD, str(own / "home")],
        cwd=packages,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        user=uid,
        group=uid,
        extra_groups=[],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(packages)},
    )
    try:
        assert process.stdout is not None
        pid, url = process.stdout.readline().split()
        assert Path(f"/proc/{pid}").stat().st_uid == uid
        assert sql(url, "select 1") == 1
        assert parse_qs(urlsplit(url).query)["host"] == [str(own / "home" / "postgres" / "socket")]
        assert json.loads((own / "home" / "postgres" / "location").read_text())["uid"] == uid
    finally:
        assert end(process) == 0
    assert not alive(int(pid))
    shutil.rmtree(own)
