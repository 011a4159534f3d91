"""Where a model's files are, that they are safe to read, and their digest.

safetensors only: a pickle is a program.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import DEMO, ModelNotFound

DEMO_DIRECTORY = Path(__file__).parent / "demo" / "weights"

# All that is read of a checkpoint, and all that is fetched from the hub: no code, no pickles.
WEIGHTS = "*.safetensors"
CONFIGURATION = ("config.json", "model.safetensors.index.json", "preprocessor_config.json", "tokenizer.json")
REQUIRED = ("config.json", "tokenizer.json")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's directory and the digests of all that is read of it, SHA-256 in hex: of each file, and of all.

    `digest` is over a line per file, `name<NUL>sha256\\n`, sorted by name.
    """

    name: str
    directory: Path
    digest: str
    hashes: Mapping[str, str]

    @property
    def weight_hashes(self) -> dict[str, str]:
        """Of the files of weights alone."""
        return {file: sha256 for file, sha256 in self.hashes.items() if Path(file).match(WEIGHTS)}


def find(name: str, *, known: Mapping[str, str] | None = None) -> Checkpoint:
    """Find `pericarp-demo`, a directory, or a hub name (fetched, where it is not yet in the hub's cache).

    Reads the whole of every file, but for those whose hash is `known`: the ones that are not read from there any more.
    Raises `ModelNotFound`, whose text holds no path but `name` itself.
    """
    if name == DEMO:
        directory = DEMO_DIRECTORY
    elif Path(name).is_dir():
        directory = Path(name)
    elif _HUB_NAME.fullmatch(name):
        directory = _fetch(name)
    else:
        raise ModelNotFound(f"no model {name!r}: neither a directory nor a hub name")
    try:
        _check(name, directory)
        hashes = _hash(directory, known or {})
    except OSError as exc:
        raise ModelNotFound(f"the files of model {name!r} cannot be read") from exc
    lines = "".join(f"{file}\0{hashes[file]}\n" for file in sorted(hashes))
    return Checkpoint(name, directory, hashlib.sha256(lines.encode()).hexdigest(), hashes)


def files(directory: Path) -> list[Path]:
    """The files that the weights are in: one, or the shards of an index. Raises `OSError` and `ValueError`."""
    whole = directory / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = read_json(directory, "model.safetensors.index.json").get("weight_map")
    names = set(map(str, index.values())) if isinstance(index, dict) else set()
    shards = sorted(path for path in directory.glob(WEIGHTS) if path.name in names)
    if not names or len(shards) < len(names):
        raise ValueError("neither whole weights nor an index of shards in the same directory")
    return shards


def read_json(directory: Path, file: str) -> dict[str, Any]:
    """One of a checkpoint's JSON objects; empty where there is no such file."""
    path = directory / file
    loaded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded if isinstance(loaded, dict) else {}


def _check(name: str, directory: Path) -> None:
    if missing := [file for file in REQUIRED if not (directory / file).is_file()]:
        raise ModelNotFound(f"model {name!r} lacks {', '.join(missing)}")
    if not any(directory.glob(WEIGHTS)):
        raise ModelNotFound(f"model {name!r} has no safetensors weights; other formats are not loaded")
    try:
        config, _ = (read_json(directory, file) for file in ("config.json", "preprocessor_config.json"))
    except ValueError as exc:
        raise ModelNotFound(f"the configuration of model {name!r} is not JSON") from exc
    if config.get("model_type") != "qwen2_5_vl":
        raise ModelNotFound(f"model {name!r} is not a Qwen2.5-VL checkpoint")


def _hash(directory: Path, known: Mapping[str, str]) -> dict[str, str]:
    hashes = {}
    for path in (*directory.glob(WEIGHTS), *(directory / each for each in CONFIGURATION)):
        if path.name in known:
            hashes[path.name] = known[path.name]
        elif path.is_file():
            with path.open("rb") as stream:
                hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, *CONFIGURATION]))
    except Exception as exc:  # the hub client's errors share no base class
        raise ModelNotFound(f"model {name!r} is neither in the hub's cache nor fetched from the hub") from exc
