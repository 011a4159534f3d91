"""What sealing and checking a model costs: Cobblestone-256 in MB/s, and finding a model that is plain, signed, or sealed.

Each figure is the best of three rounds, in this process alone, from and to memory or the page cache.

    python bench/operations_models.py [--quick]
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402

import cobblestone  # noqa: E402
from bench.report import circumstances, close  # noqa: E402
from models import Trust, weights  # noqa: E402
from models.folder import Folder  # noqa: E402
from models.manifest import SIGNATURE, public_der, sign  # noqa: E402
from models.sealed_folder import seal_folder  # noqa: E402

ROUNDS = 3
CONTEXT = b"bench"
ENCRYPT_MB_S, DECRYPT_MB_S = 308, 524
"""What the construction came to in plain Python over the same cipher, on two cores of an EPYC: the library must not be slower."""


class Nowhere:
    """Takes all, keeps nothing."""

    def write(self, data: memoryview, /) -> int:
        return len(data)


def measure(quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and aims, as a report has them."""
    plain = os.urandom((32 if quick else 256) << 20)
    key = cobblestone.new_key()
    target = io.BytesIO()
    cobblestone.encrypt(io.BytesIO(plain), target, key, CONTEXT)
    sealed = target.getvalue()

    def read_at_random() -> None:
        reader, buffer = cobblestone.Reader(io.BytesIO(sealed), key, CONTEXT), bytearray(1 << 20)
        while reader.readinto(memoryview(buffer)):
            continue

    def rate(work: Callable[[], object]) -> int:
        return round(len(plain) / 1e6 / best_s(work))

    figures: dict[str, Any] = {
        "bytes": len(plain),
        "encrypt_mb_s": rate(lambda: cobblestone.encrypt(io.BytesIO(plain), Nowhere(), key, CONTEXT)),
        "decrypt_mb_s": rate(lambda: cobblestone.decrypt(io.BytesIO(sealed), Nowhere(), key, CONTEXT)),
        "read_by_chunks_mb_s": rate(read_at_random),
        **measure_finding(),
    }
    aims = [
        {"what": f"{what} MB/s", "aim": aim, "measured": measured, "ok": measured >= aim}
        for what, aim, measured in (
            ("sealing a stream,", ENCRYPT_MB_S, figures["encrypt_mb_s"]),
            ("opening a stream,", DECRYPT_MB_S, figures["decrypt_mb_s"]),
        )
    ]
    return figures, aims


def measure_finding() -> dict[str, Any]:
    """The embedded model, 20 MB: what a worker does before it maps a weight, in milliseconds."""
    key, seal_key = Ed25519PrivateKey.generate(), cobblestone.new_key()
    with tempfile.TemporaryDirectory() as above:
        directory, sealed = Path(above) / "model", Path(above) / "sealed"
        shutil.copytree(weights.DEMO_DIRECTORY, directory)
        (directory / SIGNATURE).write_bytes(sign(Folder(directory, "model").check(), key, name="model"))
        trust = Trust(public_der(key.public_key()))
        opening = Trust(trust.signer, seal_key=seal_key)
        seal_folder(Folder(directory, "model", trust), sealed, seal_key, told=lambda done, size: None)
        cases = {
            "plain": lambda: weights.find(str(directory)),
            "signed": lambda: weights.find(str(directory), trust=trust),
            "sealed": lambda: weights.find(str(sealed), trust=opening),
        }
        size = sum(path.stat().st_size for path in directory.iterdir())
        return {
            "model_bytes": size,
            "find_ms": {name: round(best_s(work) * 1000, 1) for name, work in cases.items()},
        }


def best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within a minute")
    options = parser.parse_args()
    report = circumstances("operations_models", ["cryptography"], quick=options.quick)
    report["figures"], report["aims"] = measure(options.quick)
    return close(report, None)


if __name__ == "__main__":
    sys.exit(main())
