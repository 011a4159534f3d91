"""The witness's process: `python -m service.witness FOLDER HOST PORT`, which `python -m service witness` becomes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import uvicorn

from service.processes.sandbox import keep_out_of_files
from service.watch.logs import close, configure, get_logger
from service.witness.door import Door
from service.witness.judge import Judge
from service.witness.store import Store, StoreBroken

CONNECTIONS = 64
GRACE_S = 5

log = get_logger(__name__)


def main(folder: Path, host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT; the exit status."""
    configure("info")
    keep_out_of_files()
    try:
        store = Store(folder)
        with store.claimed():
            for key in store.logs():
                store.newest(key.name)
            server = uvicorn.Server(
                uvicorn.Config(
                    Door(Judge(store)),
                    host=host,
                    port=port,
                    http="h11",
                    ws="none",
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    proxy_headers=False,
                    limit_concurrency=CONNECTIONS,
                    timeout_graceful_shutdown=GRACE_S,
                )
            )
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(_serve(server, host, store.cosigner.key.text))
    except (StoreBroken, OSError) as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
        return 1
    finally:
        close()
    return 0 if server.started else 1


async def _serve(server: uvicorn.Server, host: str, key: str) -> None:
    announcing = asyncio.create_task(_announce(server, host, key))
    try:
        await server.serve()
    finally:
        announcing.cancel()


async def _announce(server: uvicorn.Server, host: str, key: str) -> None:
    """One line on stdout, what a gateway's PERICARP_WITNESSES takes."""
    while not server.started:  # noqa: ASYNC110 - uvicorn tells of its start by a flag alone
        await asyncio.sleep(0.02)
    name = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"http://{name}:{server.servers[0].sockets[0].getsockname()[1]}={key}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
