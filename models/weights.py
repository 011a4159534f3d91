"""Where a model's files are, that they are safe to read, and their digest.

safetensors only: a pickle is a program. Small files are read once, and what was hashed is what is parsed. Weights are
mapped from their files, or, where somebody must have signed them or they are sealed, from a copy in memory that
nobody can change any more: what was hashed is what is mapped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import ANYONE, DEMO, ModelNotFound, Trust
from models.folder import Folder, parse_object
from models.sealed_memory import Memory

DEMO_DIRECTORY = Path(__file__).parent / "demo" / "weights"

# All that is read of a checkpoint, and all that is fetched from the hub: no code, no pickles.
WEIGHTS = "*.safetensors"
CONFIGURATION = ("config.json", "model.safetensors.index.json", "preprocessor_config.json", "tokenizer.json")
REQUIRED = ("config.json", "tokenizer.json")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files, and the digests of all that is read of it, SHA-256 in hex: of each file, and of all.

    `digest` is over a line per file, `name<NUL>sha256\\n`, sorted by name. `contents` are the files that are no
    weights; `held` the weights that are in memory, for as long as this is.
    """

    name: str
    directory: Path
    digest: str
    hashes: Mapping[str, str]
    contents: Mapping[str, bytes] = field(repr=False)
    held: Mapping[str, Memory] = field(repr=False)
    manifest: str = ""
    revision: str = ""

    @property
    def weight_hashes(self) -> dict[str, str]:
        """Of the files of weights alone."""
        return {file: sha256 for file, sha256 in self.hashes.items() if Path(file).match(WEIGHTS)}

    def json(self, file: str) -> dict[str, Any]:
        """One of its JSON objects; empty where there is no such file. Raises `ModelRefused` and `ValueError`."""
        return parse_object(self.contents[file], file) if file in self.contents else {}

    def weights(self) -> list[Path]:
        """The files that the weights are in: one, or the shards of an index. Raises `ValueError`."""
        found = self.weight_hashes
        whole = "model.safetensors"
        if whole in found:
            return [self._place(whole)]
        index = self.json("model.safetensors.index.json").get("weight_map")
        names = set(map(str, index.values())) if isinstance(index, dict) else set()
        if not names or names - found.keys():
            raise ValueError("neither whole weights nor an index of shards in the same directory")
        return [self._place(file) for file in sorted(names)]

    def _place(self, file: str) -> Path:
        held = self.held.get(file)
        return self.directory / file if held is None else held.path


def find(name: str, *, known: Mapping[str, str] | None = None, trust: Trust = ANYONE) -> Checkpoint:
    """Find `pericarp-demo`, a directory, or a hub name (fetched, where it is not yet in the hub's cache).

    Reads the whole of every file, but for those whose hash is `known`: the ones that are not read from there any more.
    Raises `ModelNotFound`, whose text holds no path but `name` itself, and `ModelRefused`, whose text holds none, where
    `trust` is not met.
    """
    revision = ""
    if name == DEMO:
        directory = DEMO_DIRECTORY
    elif name and Path(name).is_dir():
        directory = Path(name)
    elif _HUB_NAME.fullmatch(name):
        directory = _fetch(name)
        revision = (
            directory.name if directory.parent.name == "snapshots" else ""
        )  # the hub's cache is laid out so
    else:
        raise ModelNotFound(f"no model {name!r}: neither a directory nor a hub name")
    try:
        return _read(name, directory, known or {}, trust, revision)
    except OSError as exc:
        raise ModelNotFound(f"the files of model {name!r} cannot be read") from exc


def _read(name: str, directory: Path, known: Mapping[str, str], trust: Trust, revision: str) -> Checkpoint:
    folder = Folder(directory, Path(name).resolve().name if Path(name).is_dir() else name, trust)
    weights = sorted(file for file in folder.names if "/" not in file and Path(file).match(WEIGHTS))
    if missing := [file for file in REQUIRED if file not in folder.names]:
        raise ModelNotFound(f"model {name!r} lacks {', '.join(missing)}")
    if not weights:
        raise ModelNotFound(f"model {name!r} has no safetensors weights; other formats are not loaded")
    contents = {file: folder.read(file) for file in CONFIGURATION if file in folder.names}
    hashes = {file: hashlib.sha256(data).hexdigest() for file, data in contents.items()}
    held = {}
    for file in weights:
        if file in known:
            hashes[file] = folder.accept(file, known[file])
        elif trust.signer:
            held[file], hashes[file] = folder.hold(file)
        else:
            hashes[file] = folder.hash(file)
    lines = "".join(f"{file}\0{hashes[file]}\n" for file in sorted(hashes))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    manifest = folder.manifest
    if manifest is not None:
        revision = manifest.revision or revision
    checkpoint = Checkpoint(
        name, directory, digest, hashes, contents, held, manifest.digest if manifest else "", revision
    )
    _check(checkpoint)
    return checkpoint


def _check(checkpoint: Checkpoint) -> None:
    try:
        config, _ = (checkpoint.json(file) for file in ("config.json", "preprocessor_config.json"))
    except ValueError as exc:
        raise ModelNotFound(f"the configuration of model {checkpoint.name!r} is not JSON") from exc
    if config.get("model_type") != "qwen2_5_vl":
        raise ModelNotFound(f"model {checkpoint.name!r} is not a Qwen2.5-VL checkpoint")


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, *CONFIGURATION]))
    except Exception as exc:  # the hub client's errors share no base class
        raise ModelNotFound(f"model {name!r} is neither in the hub's cache nor fetched from the hub") from exc
