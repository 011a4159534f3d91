"""A model's folder: what may lie in it, and its bytes, checked as they are read. Free of torch.

Refused are programs in any form (pickles, Python, links to elsewhere, configurations that name code), what everybody
may write, and, where a key is trusted, whatever that key has not signed: a file more, a file less, a byte changed.
Every file is read once: what was hashed is what is used. The files of a sealed model are ciphertexts; they are
opened into memory that nobody can change any more (memfd_create(2)), and never onto a disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cobblestone
from models import ANYONE, ModelRefused, Trust
from models.headers import HEADER_BYTES_MOST, HeaderInvalid, check_header
from models.manifest import BUNDLE_BYTES_MOST, IGNORED, SIGNATURE, Manifest, open_bundle, read_public_key
from models.sealed_memory import Memory

SEALED = ".sealed"
"""Ends the name of every file of a sealed model but its signature."""
SMALL_BYTES_MOST = 256 << 20
"""The largest file that is read into memory as one piece; tokenizers have some ten megabytes."""
PICKLES = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".keras"}
)
CODE = frozenset({".py", ".pyc", ".pyd", ".pyw", ".ipynb", ".so", ".dll", ".dylib", ".sh"})
"""What loading turns into calls, and what is code itself. Weights are safetensors alone."""
CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})
"""What makes transformers import a repository's own code."""

_PIECE_BYTES = 1 << 20


class Folder:
    """One model's files. What is read through it is as its signer said, or raises."""

    def __init__(self, directory: Path, name: str, trust: Trust = ANYONE) -> None:
        """`name` is the model's, for messages. Raises `ModelRefused`, and `OSError` where it cannot be looked through."""
        self._directory = directory
        self._name = name
        self._seal_key = trust.seal_key
        self._links = not trust.signer
        signature = Path(trust.signature) if trust.signature else directory / SIGNATURE
        self.signature: bytes | None = None
        self.manifest: Manifest | None = None
        if trust.signer:
            self.signature = self._read_signature(signature)
            self.manifest = open_bundle(self.signature, read_public_key(trust.signer))
        self._paths = {place: path for place, path in self._walk() if path.resolve() != signature.resolve()}
        self.sealed = any(each.endswith(SEALED) for each in self._paths)
        if self.sealed:
            self._strip(trust)
        self.names = frozenset(self._paths)
        for each in self.names:
            if Path(each).suffix.lower() in PICKLES | CODE:
                raise ModelRefused(f"model {name!r} holds {each}, which may be a program")
        if self.manifest is not None:
            self._compare(self.manifest)

    def read(self, file: str) -> bytes:
        """All of a small file. Raises `ModelRefused` and `OSError`."""
        target = io.BytesIO()
        self.pour(file, target, SMALL_BYTES_MOST)
        return target.getvalue()

    def hash(self, file: str) -> str:
        """SHA-256 of the plain bytes, in hex. Raises `ModelRefused` and `OSError`."""
        return self.pour(file, _Nowhere())

    def pour(self, file: str, target: Any, most: int | None = None) -> str:
        """Write the plain bytes into `target`; their SHA-256, in hex, which is what was signed.

        Where it raises, what was written is to be thrown away. Raises `ModelRefused` and `OSError`.
        """
        if file not in self._paths:
            raise ModelRefused(f"model {self._name!r} has no {file}")
        meter = _Meter(target, most)
        flags = os.O_RDONLY | os.O_CLOEXEC | (0 if self._links else os.O_NOFOLLOW)
        with os.fdopen(os.open(self._paths[file], flags), "rb", buffering=0) as source:
            if self.sealed:
                try:
                    cobblestone.decrypt(source, meter, self._seal_key, seal_context(file))
                except cobblestone.NotAuthentic as exc:
                    raise ModelRefused(
                        f"{file} of model {self._name!r} is not what was sealed under this key"
                    ) from exc
            else:
                while data := source.read(_PIECE_BYTES):
                    meter.write(memoryview(data))
        return self.accept(file, meter.sha256.hexdigest())

    def accept(self, file: str, digest: str) -> str:
        """That `digest` of a file that was read before is what was signed. Raises `ModelRefused`."""
        if self.manifest is not None and digest != self.manifest.files.get(file):
            raise ModelRefused(f"{file} of model {self._name!r} is not the file that was signed")
        return digest

    def hold(self, file: str) -> tuple[Memory, str]:
        """The plain bytes in memory that nobody can change any more, and their SHA-256.

        Raises `ModelRefused`, and `OSError` where there is no memory left.
        """
        memory = Memory("model")
        digest = self.pour(file, memory)
        memory.seal()
        return memory, digest

    def check(self, told: Callable[[int, int], object] = lambda done, size: None) -> Manifest:
        """Look at every byte: the manifest of all there is. Raises `ModelRefused` and `OSError`."""
        files = {}
        for done, file in enumerate(sorted(self.names)):
            told(done, len(self.names))
            suffix = Path(file).suffix
            if suffix == ".json" and Path(file).name != "tokenizer.json":
                try:
                    data = self.read(file)
                    parse_object(data, file)
                except ValueError as exc:
                    raise ModelRefused(f"{file} of model {self._name!r} is not JSON") from exc
                files[file] = hashlib.sha256(data).hexdigest()
            elif suffix == ".safetensors":
                files[file] = self._check_weights(file)
            else:
                files[file] = self.hash(file)
        if not files:
            raise ModelRefused(f"model {self._name!r} has no files")
        return Manifest(files, self.manifest.revision if self.manifest else "")

    def _check_weights(self, file: str) -> str:
        head = _Head()
        digest = self.pour(file, head)
        try:
            check_header(head.data, head.size)
        except HeaderInvalid as exc:
            raise ModelRefused(f"{file} of model {self._name!r} has an odd header: {exc}") from exc
        return digest

    def _walk(self) -> Iterator[tuple[str, Path]]:
        """Every file with its place. Raises `ModelRefused` for what is no plain file, or may be written by everybody."""
        self._check_mode(self._directory)
        for above, folders, files in os.walk(self._directory, onerror=_raise, followlinks=False):
            if Path(above) == self._directory:
                folders[:] = [each for each in folders if each not in IGNORED]
                files = [each for each in files if each not in IGNORED]
            for each in (*folders, *files):
                path = Path(above, each)
                place = path.relative_to(self._directory).as_posix()
                if path.is_symlink() and (not self._links or path.is_dir()):
                    raise ModelRefused(
                        f"model {self._name!r} holds a link, {place}: a model has files of its own"
                    )
                self._check_mode(path)
                if each in files:
                    if not path.is_file():
                        raise ModelRefused(f"model {self._name!r} holds {place}, which is no plain file")
                    if self.manifest is None or not self.manifest.ignores(place.removesuffix(SEALED)):
                        yield place, path

    def _check_mode(self, path: Path) -> None:
        if path.stat().st_mode & stat.S_IWOTH:
            raise ModelRefused(
                f"a file or folder of model {self._name!r} may be written by everybody: {path.name}"
            )

    def _strip(self, trust: Trust) -> None:
        """The names of a sealed model's files as they were before."""
        if not trust.seal_key:
            raise ModelRefused(f"model {self._name!r} is sealed, and there is no key to open it")
        if not trust.signer:
            raise ModelRefused(
                f"model {self._name!r} is sealed, and there is no key that must have signed it"
            )
        if plain := [each for each in self._paths if not each.endswith(SEALED)]:
            raise ModelRefused(f"model {self._name!r} is sealed, but {min(plain)} is not")
        self._paths = {each.removesuffix(SEALED): path for each, path in self._paths.items()}

    def _read_signature(self, path: Path) -> bytes:
        try:
            self._check_mode(path)
            with path.open("rb") as file:
                return file.read(BUNDLE_BYTES_MOST + 1)
        except OSError as exc:
            raise ModelRefused(f"model {self._name!r} is not signed: {path.name} cannot be read") from exc

    def _compare(self, manifest: Manifest) -> None:
        if extra := self.names - manifest.files.keys():
            raise ModelRefused(f"model {self._name!r} holds {min(extra)}, which was not signed")
        if missing := manifest.files.keys() - self.names:
            raise ModelRefused(f"model {self._name!r} lacks {min(missing)}, which was signed")


def seal_context(file: str) -> bytes:
    """What a sealed file's ciphertext is bound to: that it is this file of a model."""
    return b"pericarp sealed model file v1\0" + file.encode()


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object that names no code; empty where it is something else. Raises `ModelRefused` and `ValueError`."""

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if found := CODE_KEYS & {key for key, _ in pairs}:
            raise ModelRefused(f"{what} names code to run, by {min(found)}")
        return dict(pairs)

    parsed = json.loads(data, object_pairs_hook=look)
    return parsed if isinstance(parsed, dict) else {}


class _Meter:
    """Hashes what goes on to `target`, at most `most` bytes of it."""

    def __init__(self, target: Any, most: int | None) -> None:
        self.sha256 = hashlib.sha256()
        self._target = target
        self._left = most

    def write(self, data: memoryview) -> int:
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise ModelRefused("a file of the model is far too large")
        self.sha256.update(data)
        rest = data
        while rest:
            rest = rest[self._target.write(rest) :]
        return len(data)


class _Nowhere:
    def write(self, data: memoryview) -> int:
        return len(data)


class _Head:
    """Keeps the header of a safetensors file, and counts the rest."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.size = 0

    def write(self, data: memoryview) -> int:
        self.size += len(data)
        wanted = 8 + int.from_bytes(self.data[:8], "little") if len(self.data) >= 8 else 8 + len(data)
        room = min(wanted, HEADER_BYTES_MOST + 8) - len(self.data)
        if room > 0:
            self.data += data[:room]
        return len(data)


def _raise(error: OSError) -> None:
    raise error
