"""Doctor's checks of what lies on disk and is configured: each finds what it is there for, and a look that fails is no pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.__main__ import app
from service.doctor import commands, deployment, files, host, network, processes
from service.doctor.check import Check, Finding, State, Unseen, judge, make
from service.doctor.examination import CHECKS
from service.doctor.sight import Process, Sight
from service.settings import Settings
from tests.certificates import authority, issue


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home as it should be, as whoever runs the tests."""
    made = tmp_path / "home"
    for folder in (made, made / "secrets", made / "logs"):
        folder.mkdir(mode=0o700)
    for name in ("pepper", "master-key", "log-key"):
        (made / "secrets" / name).write_bytes(bytes(32))
        (made / "secrets" / name).chmod(0o600)
    (made / "logs" / "postgres.log").touch(0o600)
    return made


def sight(home: Path, **settings: object) -> Sight:
    return Sight(Settings(home=home, **settings))  # type: ignore[arg-type]


def test_a_look_that_fails_cannot_tell_and_says_no_word_of_the_error(home: Path) -> None:
    def unseen(_sight: Sight) -> Finding:
        raise Unseen("it is dark")

    def fails(_sight: Sight) -> Finding:
        raise ValueError("a password")

    def sees(_sight: Sight) -> Finding:
        return judge(["", "one thing", "another"], "nothing is wrong", "mend it")

    looks = {"unseen": unseen, "fails": fails, "sees": sees, "well": lambda _: judge([""], "all of it", "")}
    results = list(make([Check(name, "", look) for name, look in looks.items()], sight(home)))
    assert [(each.state, each.seen, each.remedy) for each in results] == [
        (State.UNKNOWN, "it is dark", ""),
        (State.UNKNOWN, "the check itself failed: ValueError", ""),
        (State.BROKEN, "one thing; another", "mend it"),
        (State.HOLDS, "all of it", ""),
    ]


def test_every_check_has_a_name_of_its_own_and_says_what_is_promised() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.promise.endswith(".") for check in CHECKS)


def open_the_home(home: Path) -> str:
    home.chmod(0o755)
    return "mode 0755"


def open_a_secret(home: Path) -> str:
    (home / "secrets" / "pepper").chmod(0o640)
    return "pepper has mode 0640"


def cut_a_secret(home: Path) -> str:
    (home / "secrets" / "log-key").write_bytes(bytes(31))
    return "log-key has 31 bytes"


def lose_a_secret(home: Path) -> str:
    (home / "secrets" / "master-key").unlink()
    return "master-key is missing"


def link_a_secret(home: Path) -> str:
    (home / "secrets" / "pepper").unlink()
    (home / "secrets" / "pepper").symlink_to("log-key")
    return "pepper is no plain file"


def open_the_log(home: Path) -> str:
    (home / "logs" / "postgres.log").chmod(0o644)
    return "postgres.log has mode 0644"


@pytest.mark.parametrize(
    ("harm", "look"),
    [
        (open_the_home, files.look_at_home),
        (open_a_secret, files.look_at_secrets),
        (cut_a_secret, files.look_at_secrets),
        (lose_a_secret, files.look_at_secrets),
        (link_a_secret, files.look_at_secrets),
        (open_the_log, files.look_at_logs),
    ],
)
def test_a_file_that_others_reach_or_that_is_not_whole_is_found(
    home: Path, harm: Callable[[Path], str], look: Callable[[Sight], Finding]
) -> None:
    assert look(sight(home)).state is State.HOLDS
    fault = harm(home)
    found = look(sight(home))
    assert found.state is State.BROKEN and fault in found.seen and found.remedy


def test_a_secret_of_somebody_else_is_found(home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(home / "secrets" / "pepper", 12345, 12345)
    found = files.look_at_secrets(sight(home))
    assert found.state is State.BROKEN and "belongs to uid 12345" in found.seen


def test_a_home_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with sight(tmp_path / "none", port=0) as nowhere:
        chosen = [
            check for check in CHECKS if check.name != "alerts"
        ]  # it asks a command, which takes seconds
        results = {result.name: result for result in make(chosen, nowhere)}
    assert not (tmp_path / "none").exists()
    unseen = {"home", "secrets", "log files", "database files", "service", "role", "log tree", "backups"}
    assert {results[name].state for name in unseen} == {State.UNKNOWN}
    assert not any("the check itself failed" in result.seen for result in results.values())


def test_a_check_that_nobody_knows_is_wrong_usage_and_help_tells_the_statuses(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERICARP_HOME", str(tmp_path / "none"))
    wrong = CliRunner().invoke(app, ["doctor", "--only", "everything"])
    assert wrong.exit_code == 2 and "no check is named everything" in wrong.output
    told = CliRunner().invoke(app, ["doctor", "--only", "home", "--json"])
    (check,) = json.loads(told.stdout)["checks"]
    assert told.exit_code == 1 and (check["name"], check["state"]) == ("home", "cannot tell")
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("PERICARP_HOME", str(home))
    assert CliRunner().invoke(app, ["doctor", "--only", "home", "--only", "secrets"]).exit_code == 0
    assert "Exit status: 0 everything holds" in " ".join(
        CliRunner().invoke(app, ["doctor", "--help"]).output.split()
    )


@pytest.mark.parametrize("harm", ["pytorch_model.bin", "modeling.py", "model.PT"])
def test_a_model_with_a_program_in_it_is_found(home: Path, tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir(mode=0o755)
    (folder / "model.safetensors").touch(0o644)
    assert deployment.look_at_model(sight(home, model=str(folder))).state is State.HOLDS
    (folder / harm).touch(0o644)
    assert harm in deployment.look_at_model(sight(home, model=str(folder))).seen
    (folder / harm).unlink()
    (folder / "model.safetensors").chmod(0o666)
    assert "may be written by others" in deployment.look_at_model(sight(home, model=str(folder))).seen
    (folder / "model.safetensors").unlink()
    assert "no safetensors" in deployment.look_at_model(sight(home, model=str(folder))).seen
    with pytest.raises(Unseen):
        deployment.look_at_model(sight(home, model="somebody/something"))


def done(status: int, out: object = "", err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], status, out if isinstance(out, str) else json.dumps(out), err)


def test_what_other_commands_say_is_taken_by_their_exit_status() -> None:
    assert commands.judge_signature(done(0)).state is State.HOLDS
    changed = commands.judge_signature(
        done(1, err="ModelRefused: model.safetensors is not as it was signed\n")
    )
    assert changed.state is State.BROKEN and "not as it was signed" in changed.seen
    assert "PERICARP_MODEL_KEY" in commands.judge_signature(done(2, err="Missing option")).seen
    mail = {"name": "mail", "severity": "warning", "heartbeat_s": None}
    assert commands.judge_sinks(done(0, {"sinks": []})).seen == "alerts go to the log alone"
    assert "no sink gets a heartbeat" in commands.judge_sinks(done(0, {"sinks": [mail]})).seen
    assert commands.judge_sinks(done(0, {"sinks": [mail, mail | {"heartbeat_s": 60.0}]})).state is State.HOLDS
    assert commands.judge_sinks(done(1, err="AlertsInvalid: rule: 1 is wrong")).state is State.BROKEN


def test_a_command_that_this_version_does_not_have_cannot_be_asked() -> None:
    with pytest.raises(Unseen, match="no command `horoscope read`"):
        commands.ask("horoscope", "read")


def test_a_unit_that_is_not_hardened_is_found(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    assert deployment.look_at_unit(sight(home)).state is State.HOLDS
    bare = tmp_path / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    monkeypatch.setattr(deployment, "UNITS", (bare,))
    found = deployment.look_at_unit(sight(home))
    assert found.state is State.BROKEN and "UNSAFE" in found.seen


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        ({"host": "127.0.0.1"}, State.HOLDS),
        ({"host": "::1"}, State.HOLDS),
        ({"host": "localhost"}, State.HOLDS),
        ({"host": "0.0.0.0", "plaintext": True}, State.BROKEN),
        ({"host": "example.org", "plaintext": True}, State.BROKEN),
        ({"metrics_port": 9090}, State.HOLDS),
        ({"metrics_port": 9090, "metrics_host": "0.0.0.0"}, State.BROKEN),
        ({"host": "0.0.0.0", "trusted_proxies": "10.0.0.0/8"}, State.HOLDS),
    ],
)
def test_a_bind_that_a_network_reaches_needs_tls(
    home: Path, settings: dict[str, object], state: State
) -> None:
    assert network.look_at_reach(sight(home, **settings)).state is state


def test_certificates_that_expire_or_do_not_fit_are_found(home: Path, tmp_path: Path) -> None:
    ca = authority()
    good, late, over = (issue(ca, days=days) for days in ((-1, 100), (-1, 3), (-9, -2)))
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    key.touch(0o600)

    def look(shown: bytes, secret: bytes) -> Finding:
        certificate.write_bytes(shown)
        key.write_bytes(secret)
        # Nobody listens there: that the service shows another certificate is for another test.
        return network.look_at_certificates(sight(home, tls_certificate=certificate, tls_key=key, port=1))

    assert look(good.pem, good.key_pem).state is State.HOLDS
    assert "expires on" in look(late.pem, late.key_pem).seen
    assert "expired on" in look(over.pem, over.key_pem).seen
    assert "is not the key of" in look(good.pem, late.key_pem).seen
    key.chmod(0o644)
    assert "has mode 0644" in look(good.pem, good.key_pem).seen
    assert network.look_at_certificates(sight(home)).state is State.HOLDS


def test_backups_that_others_may_write_are_found(home: Path, tmp_path: Path) -> None:
    store = tmp_path / "backups"
    assert files.look_at_backup_store(sight(home)).state is State.BROKEN
    for chosen in (str(store), "s3://bucket/prefix"):
        with pytest.raises(Unseen):
            files.look_at_backup_store(sight(home, backup_store=chosen))
    store.mkdir(mode=0o700)
    (store / "part").touch(0o600)
    assert files.look_at_backup_store(sight(home, backup_store=str(store))).state is State.HOLDS
    (store / "part").chmod(0o620)
    assert "part has mode 0620" in files.look_at_backup_store(sight(home, backup_store=str(store))).seen


def test_room_that_runs_out_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.look_at_disk(sight(home)).state is State.HOLDS
    monkeypatch.setattr(host, "FREE_BYTES", 1 << 60)
    found = host.look_at_disk(sight(home))
    assert found.state is State.BROKEN and "left of" in found.seen


class Peopled(Sight):
    """With processes of the test's making."""

    def __init__(self, home: Path, *processes: Process) -> None:
        super().__init__(Settings(home=home))
        self.processes = processes


def process(
    tmp_path: Path, kind: str, *, core: str = "0", pid: int = 7, uid: int = 5000, **told: str
) -> Process:
    """A process as /proc would tell of it."""
    folder = tmp_path / str(pid)
    folder.mkdir()
    (folder / "limits").write_text(f"Max core file size        {core:<20} {core:<20} bytes\n")
    lines = {"Uid": f"{uid}\t{uid}\t{uid}\t{uid}", "NoNewPrivs": "1", "Seccomp": "2", **told}
    (folder / "status").write_text("".join(f"{name}:\t{value}\n" for name, value in lines.items()))
    return Process(pid, 1, kind, folder, ("python", "-m", "something"))


def test_processes_that_give_more_than_they_should_are_found(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SETTLED_S", 0.0)
    well = process(tmp_path, "screening", pid=7)
    cases = [
        (
            processes.look_at_core_dumps,
            process(tmp_path, "worker", pid=8, core="unlimited"),
            "worker 8 may leave",
        ),
        (processes.look_at_children, process(tmp_path, "worker", pid=9, NoNewPrivs="0"), "worker 9 may gain"),
        (
            processes.look_at_children,
            process(tmp_path, "screening", pid=10, Seccomp="0"),
            "screening 10 has no filter",
        ),
    ]
    for look, ill, told in cases:
        assert look(Peopled(home, well)).state is State.HOLDS
        found = look(Peopled(home, well, ill))
        assert found.state is State.BROKEN and told in found.seen
    key = Process(11, 1, "gateway", well.folder, ("python", "postgresql://me:hush@host/db"))
    found = processes.look_at_arguments(Peopled(home, key))
    assert found.state is State.BROKEN and "hush" not in found.seen
    gateway = process(tmp_path, "gateway", pid=12, uid=0)
    child = Process(13, 12, "worker", gateway.folder, ("python",))
    assert processes.look_at_users(Peopled(home, gateway, child)).state is State.BROKEN
    assert host.look_at_user(Peopled(home, gateway)).state is State.BROKEN
    with pytest.raises(Unseen):
        processes.look_at_core_dumps(Peopled(home))


def test_a_measure_that_does_not_hold_is_found_wherever_readyz_tells_it(home: Path) -> None:
    images = {"uid": True, "calls": False}
    told = {
        "screening": {"sandbox": {"images": images, "texts": {"uid": True}}},
        "workers": {"sandbox": {"core": True}},
    }
    seen = sight(home)
    seen.readiness = told
    found = processes.look_at_locks(seen)
    assert (found.state, found.seen) == (State.BROKEN, "screening images: calls")
    images["calls"] = True
    assert processes.look_at_locks(seen).state is State.HOLDS


def test_a_child_that_is_just_starting_is_waited_for(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, child = process(tmp_path, "gateway", pid=20, uid=0), process(tmp_path, "worker", pid=21, uid=0)
    child = Process(21, 20, "worker", child.folder, child.arguments)

    def settle(_s: float) -> None:
        status = child.folder / "status"
        status.write_text(status.read_text().replace("Uid:\t0\t0", "Uid:\t5000\t5000"))

    monkeypatch.setattr("service.doctor.processes.time.sleep", settle)
    assert processes.look_at_users(Peopled(home, gateway, child)).state is State.HOLDS
