"""A real S3 store of one process (SeaweedFS), and a proxy before it that cuts the network after so many bytes."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.store import S3Store

WEED = Path(sys.executable).with_name("weed")
ACCESS, SECRET = "backups", "not-much-of-a-secret"
START_S = 60.0


@dataclass(frozen=True, slots=True)
class S3:
    """Where it listens, on 127.0.0.1."""

    port: int

    def settings(self, port: int | None = None) -> dict[str, str]:
        """What an S3 client of that store has in its environment; `port` is a proxy's."""
        return {
            "PERICARP_BACKUP_STORE": "s3://backups/pericarp",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }


@contextmanager
def s3_store() -> Iterator[S3]:
    """An empty store. It ignores SIGTERM for half a minute, so it is killed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pericarp-s3-"))
    identity = {
        "name": "b",
        "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}],
        "actions": ["Admin"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    ports = free_ports(8)
    names = [f"{role}.port{kind}" for role in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    words = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(WEED, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                *("-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
                *("-master.volumeSizeLimitMB=128", "-volume.max=32", "-master.telemetry=false", *words),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        found = S3(ports[6])
        deadline_s = time.monotonic() + START_S
        while not _listens(found.port):
            assert process.poll() is None and time.monotonic() < deadline_s, (folder / "log").read_text()[
                -3000:
            ]
            time.sleep(0.1)
        bucket = S3Store(
            "backups",
            endpoint=f"http://127.0.0.1:{found.port}",
            region="us-east-1",
            access_key_id=ACCESS,
            secret_access_key=SECRET,
            client_options={"allow_http": True},
        )
        obstore.put(bucket, "made", b"")  # makes the bucket
        yield found
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


class Faults:
    """A proxy on a port of its own: bytes pass until `left` of those to the store are used up; then the network is cut."""

    def __init__(self, behind: int) -> None:
        self._behind = behind
        self.left: int | None = None
        """None: all pass."""
        self.port = 0

    async def serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await ended.wait()
        server.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with ExitStack() as stack:
            stack.callback(writer.transport.abort)
            if self.left == 0:
                return
            behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self._behind)
            stack.callback(behind_writer.transport.abort)
            tasks = [
                asyncio.ensure_future(self._pump(reader, behind_writer, counted=True)),
                asyncio.ensure_future(self._pump(behind_reader, writer, counted=False)),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool
    ) -> None:
        while chunk := await reader.read(65536):
            if counted and self.left is not None:
                self.left = max(0, self.left - len(chunk))
            if self.left == 0:
                return
            writer.write(chunk)
            await writer.drain()


@contextmanager
def faults_before(port: int) -> Iterator[Faults]:
    """A proxy before that port, in a thread of its own."""
    proxy, ready, ended = Faults(port), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(proxy.serve(ready, ended))

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
        loop.close()


def free_ports(count: int) -> list[int]:
    """Free at this moment, on 127.0.0.1."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    """Whether the store answers requests, not only connections."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0) as line:
            line.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            return b" 200 " in line.recv(100)
    except OSError:
        return False
