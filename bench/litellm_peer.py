"""LiteLLM's proxy beside this gateway, each in front of an echo: for `bench/admission.py`.

The proxy gets the same Postgres, virtual keys and an rpm limit where its database client (Prisma) can be had; that
client's engines come from a download of their own. Without them it runs as it also may, with a master key and no
database: it then keeps no keys and counts nothing there, which is less work than ours, and the report says so.

    python bench/litellm_peer.py --upstream PORT        the echo that speaks Cohere's rerank
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import make_url

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.request import console, spread  # noqa: E402
from bench.traffic import Target, load  # noqa: E402

CLIENTS = (1, 16)
ROUNDS, TURN_S, REQUESTS = 5, 8.0, 2_000
QUICK_TURN_S = 1.2
START_S = 180.0
HOST = "127.0.0.1"
CONFIG = """
model_list:
  - model_name: echo
    litellm_params: {{model: cohere/echo, api_key: none, api_base: "http://{host}:{port}", rpm: 1000000}}
litellm_settings: {{telemetry: false}}
"""


def beside(venv: Path, ours: Target, superuser_url: str, body: bytes, *, quick: bool) -> dict[str, Any]:
    """Both at the same bodies, by turns. Raises SystemExit where the proxy does not start at all."""
    named = json.dumps({**json.loads(body), "model": "echo"}).encode()
    with tempfile.TemporaryDirectory(prefix="pericarp-litellm-") as folder, _upstream() as upstream:
        database = _prepare_database(venv, superuser_url)
        with _proxy(venv, Path(folder), upstream.port, database) as (proxy, version):
            figures = [
                _take_turns(clients, upstream, proxy, ours, body, named, quick=quick) for clients in CLIENTS
            ]
    return {
        "litellm": version,
        "state": database.told,
        "figures": figures,
    }


class _Database:
    """Where LiteLLM keeps its state, or why it keeps none."""

    def __init__(self, url: str | None, told: str) -> None:
        self.url = url
        self.told = told


def _prepare_database(venv: Path, superuser_url: str) -> _Database:
    """A database for LiteLLM on the same server, if its client can be made."""
    schema = next(venv.glob("lib/python3*/site-packages/litellm/proxy/schema.prisma"), None)
    tool = venv / "bin" / "prisma"
    if schema is None or not tool.exists():
        return _Database(None, "master key, no database: its environment has no prisma")
    made = subprocess.run(
        [str(tool), "generate", f"--schema={schema}"],
        env=os.environ | {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if made.returncode:
        why = next(
            (
                line
                for line in reversed(made.stderr.splitlines() + made.stdout.splitlines())
                if "rror" in line
            ),
            "",
        )
        return _Database(None, f"master key, no database: `prisma generate` failed: {why.strip()[:300]}")

    async def create() -> None:
        connection = await asyncpg.connect(superuser_url)
        try:
            await connection.execute("create database litellm")
        finally:
            await connection.close()

    asyncio.run(create())
    url = make_url(superuser_url).set(database="litellm", host="localhost")
    return _Database(
        url.render_as_string(hide_password=False), "virtual keys with an rpm limit, the same Postgres"
    )


@contextlib.contextmanager
def _upstream() -> Iterator[Target]:
    port = _free_port()
    process = subprocess.Popen([sys.executable, str(Path(__file__)), "--upstream", str(port)], cwd=ROOT)
    try:
        _await_port(port, process)
        yield Target(HOST, port, "none")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _proxy(venv: Path, folder: Path, upstream: int, database: _Database) -> Iterator[tuple[Target, str]]:
    """The proxy as one process with one worker, as ours is one; its secrets go through its environment."""
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(host=HOST, port=upstream))
    port = _free_port()
    master_key = f"sk-{secrets.token_hex(24)}"
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("PERICARP_", "LITELLM_"))
    }
    environ |= {
        "LITELLM_MASTER_KEY": master_key,
        "LITELLM_SALT_KEY": f"sk-{secrets.token_hex(24)}",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
    }
    if database.url is not None:
        environ["DATABASE_URL"] = database.url
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [str(venv / "bin" / "litellm"), *("--config", str(config)), *("--host", HOST, "--port", str(port))],
        cwd=folder,
        env=environ,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        with console.status("starting LiteLLM"):
            _await_answer(port, process, folder / "log")
        key = master_key
        if database.url is not None:
            key = _ask(port, master_key, "/key/generate", {"rpm_limit": 1_000_000, "models": ["echo"]})["key"]
        version = subprocess.run(
            [
                str(venv / "bin" / "python"),
                "-c",
                "import importlib.metadata as m; print(m.version('litellm'))",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        yield Target(HOST, port, key), version
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def _take_turns(
    clients: int, upstream: Target, proxy: Target, ours: Target, body: bytes, named: bytes, *, quick: bool
) -> dict[str, Any]:
    """The echo itself, the proxy, and we, one after another, and then backwards."""
    turns = [("direct", upstream, named), ("litellm", proxy, named), ("ours", ours, body)]
    walls: dict[str, list[float]] = {name: [] for name, *_ in turns}
    rates: dict[str, list[float]] = {name: [] for name, *_ in turns}
    for number in range(1 if quick else ROUNDS):
        for name, target, sent in turns if number % 2 == 0 else turns[::-1]:
            samples, seconds = asyncio.run(
                load(
                    target,
                    [sent],
                    clients=clients,
                    requests=REQUESTS,
                    until_s=time.monotonic() + (QUICK_TURN_S if quick else TURN_S),
                    told=lambda: None,
                )
            )
            walls[name] += [sample.wall_ms for sample in samples]
            rates[name].append(len(samples) / seconds)
    spreads = {name: spread(taken) for name, taken in walls.items()}
    told = ", ".join(f"{name} {each['p50']} ms" for name, each in spreads.items())
    console.print(f"{clients} clients: {told}")
    return {
        "clients": clients,
        "requests": {name: len(taken) for name, taken in walls.items()},
        "direct_ms": spreads["direct"],
        "litellm_ms": spreads["litellm"],
        "litellm_added_ms": {
            percentile: round(ms - spreads["direct"][percentile], 2)
            for percentile, ms in spreads["litellm"].items()
        },
        "ours_ms": spreads["ours"],
        "requests_per_s": {name: round(statistics.median(each), 1) for name, each in rates.items()},
    }


def _ask(port: int, key: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    connection.request(
        "POST", path, json.dumps(body), {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    told: dict[str, Any] = json.load(answer)
    if answer.status != 200:
        raise SystemExit(f"LiteLLM answered {answer.status} to {path}")
    return told


def _free_port() -> int:
    with socket.socket() as line:
        line.bind((HOST, 0))
        port: int = line.getsockname()[1]
        return port


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        time.sleep(0.05)
    raise SystemExit("the echo did not start")


def _await_answer(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(HOST, port, timeout=2)
            connection.request("GET", "/health/liveliness")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"LiteLLM did not start: {log.read_text(errors='replace')[-1500:]}")


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Cohere's rerank, as much of HTTP/1.1 as that needs."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            count = len(json.loads(await reader.readexactly(length))["documents"])
            answer = json.dumps(
                {
                    "id": "echo",
                    "results": [{"index": place, "relevance_score": 0.5} for place in range(count)],
                    "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
                }
            ).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(answer), answer)
            )
    writer.close()


async def _serve(port: int) -> None:
    server = await asyncio.start_server(_echo, HOST, port)
    await server.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--upstream":
        raise SystemExit(__doc__)
    asyncio.run(_serve(int(sys.argv[2])))
