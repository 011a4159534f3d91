"""What `deploy/` and the `Dockerfile` promise: little privilege, pinned versions, no secrets, and limits before the service."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
UNIT, GPU = ROOT / "deploy" / "pericarp.service", ROOT / "deploy" / "pericarp.service.d" / "gpu.conf"
SECRET = re.compile(r"secret|password|token|_key|database_url", re.IGNORECASE)
ANALYZE = shutil.which("systemd-analyze")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order, each as its name and the rest of its line."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (name.upper(), rest.strip())
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


INSTRUCTIONS = instructions()
LAST_STAGE = INSTRUCTIONS[max(place for place, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def only(name: str) -> str:
    (rest,) = [rest for each, rest in LAST_STAGE if each == name]
    return rest


def test_the_image_is_built_from_exact_versions_and_downloads_by_pip_alone() -> None:
    for name, rest in INSTRUCTIONS:
        assert name != "ADD", "COPY cannot fetch"
        if name == "FROM":
            tag = rest.split()[0].partition(":")[2]
            assert re.fullmatch(r"\d+\.\d+\.\d+-[a-z-]+", tag), rest
        if name == "RUN":
            assert not re.search(r"\b(curl|wget|apt-get|apt|git|sudo)\b", rest), rest
    pip = next(rest for name, rest in INSTRUCTIONS if name == "RUN" and "pip install" in rest)
    assert "--require-hashes --no-deps -r requirements.lock" in pip
    torch = next(rest for name, rest in INSTRUCTIONS if name == "ARG" and rest.startswith("TORCH="))
    assert torch.removeprefix("TORCH=") in (ROOT / "Makefile").read_text()


def test_nothing_secret_is_baked_into_the_image() -> None:
    for name, rest in INSTRUCTIONS:
        if name in ("ENV", "ARG"):
            assert not [word for word in shlex.split(rest) if SECRET.search(word.partition("=")[0])], rest
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert kept[0] == "*", "what is not named does not come into the build"
    named = {line.removeprefix("!") for line in kept if line.startswith("!")}
    copied = {
        source
        for name, rest in INSTRUCTIONS
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == named


def test_the_container_runs_as_nobody_in_particular_and_needs_no_shell() -> None:
    uid = only("USER").partition(":")[0]
    assert uid.isdigit() and int(uid) >= 10_000
    order = [name for name, _ in LAST_STAGE]
    assert max(place for place, name in enumerate(order) if name in ("RUN", "COPY")) < order.index("USER")
    for command in (only("ENTRYPOINT"), only("CMD"), only("HEALTHCHECK").partition("CMD ")[2]):
        words = json.loads(command)
        assert words and not {"sh", "bash", "/bin/sh"} & set(words)
    assert "PERICARP_PLAINTEXT" not in only("ENV"), "who runs it says so"


def test_the_composition_gives_the_service_no_privilege_and_no_way_out() -> None:
    composed: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    for name, service in composed["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "pid", "ipc", "network_mode"} & service.keys(), name
    pericarp = composed["services"]["pericarp"]
    assert "ports" not in pericarp and pericarp["mem_limit"] and pericarp["pids_limit"]
    assert all(composed["networks"][network].get("internal") for network in pericarp["networks"])


def unit(path: Path) -> dict[str, list[str]]:
    """Its settings, each with its values in order."""
    lines = [line for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")]
    pairs = sorted((line.split("=", 1) for line in lines), key=lambda pair: pair[0])
    return {name: [value for _, value in group] for name, group in groupby(pairs, key=lambda pair: pair[0])}


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here (Debian: systemd)")
@pytest.mark.parametrize("drop_ins", [(), (GPU,)], ids=["cpu", "gpu"])
def test_systemd_rates_the_unit_2_at_most(drop_ins: tuple[Path, ...], tmp_path: Path) -> None:
    """A drop-in is read as systemd reads it: after the unit."""
    merged = tmp_path / "pericarp.service"
    sections = UNIT.read_text().split("\n[Install]")
    extra = "\n".join(path.read_text().partition("[Service]")[2] for path in drop_ins)
    merged.write_text(f"{sections[0]}\n{extra}\n[Install]{sections[1]}")
    done = subprocess.run(
        [str(ANALYZE), "security", "--offline=true", "--threshold=20", "--no-pager", str(merged)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_the_unit_allows_what_the_service_does() -> None:
    settings = unit(UNIT)
    allowed = " ".join(settings["SystemCallFilter"]).split()
    assert {"seccomp", "landlock_create_ruleset", "landlock_restrict_self"} <= set(allowed), (
        "for the lock of children"
    )
    assert "~@resources" not in allowed, "children lower their priority and their limits"
    assert "AF_UNIX" in settings["RestrictAddressFamilies"][0], "the wire, and the embedded Postgres"
    assert "MemoryDenyWriteExecute" not in settings, "torch's kernels are compiled while they run"
    assert "ProcSubset" not in settings, "glibc and torch read /proc/sys and /proc/cpuinfo"
    assert int(settings["TimeoutStopSec"][0]) > 90, "the embedded Postgres may take that long"
    text = UNIT.read_text()
    assert not re.search(r"^(Environment|SetCredential)=.*postgresql://", text, re.MULTILINE)
    assert re.findall(r"^# LoadCredential=(\w+):", text, re.MULTILINE) == [
        "PERICARP_DATABASE_URL",
        "PERICARP_OWNER_DATABASE_URL",
    ]


@pytest.mark.parametrize(
    ("path", "limits"),
    [
        (
            "Caddyfile",
            (
                "read_header 10s",
                "read_body 60s",
                "max_size 64MiB",
                "header_up -Client-Cert",
                "header_up -Client-Cert-Chain",
            ),
        ),
        (
            "nginx.conf",
            (
                "client_header_timeout 10s;",
                "client_body_timeout 10s;",
                "client_max_body_size 64m;",
                "limit_conn pericarp_connections 50;",
                'proxy_set_header Client-Cert "";',
                'proxy_set_header Client-Cert-Chain "";',
                "proxy_set_header X-Forwarded-For $remote_addr;",
                "ssl_protocols TLSv1.2 TLSv1.3;",
            ),
        ),
    ],
)
def test_a_proxy_limits_bodies_time_and_connections_and_strips_what_only_it_may_say(
    path: str, limits: tuple[str, ...]
) -> None:
    lines = {line.strip() for line in (ROOT / "deploy" / path).read_text().splitlines()}
    assert lines >= set(limits)
    text = "\n".join(
        line for line in (ROOT / "deploy" / path).read_text().splitlines() if not line.strip().startswith("#")
    )
    assert text.count("{") == text.count("}")
