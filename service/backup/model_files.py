"""A model's files in the store: each once, by the SHA-256 of its content, whatever backups it belongs to.

    <installation>/models/<sha256>/content.NNNNNN   sealed to the digest
    <installation>/models/<sha256>/whole            size and SHA-256 of what is stored; last

A backup's part `model` lists the files of its moment. What is read back is compared with the digest of that list.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

import orjson

import cobblestone
from models import DEMO
from models.weights import DEMO_DIRECTORY
from service.backup import BackupDamaged, BackupRefused
from service.backup.parts import Part, SealedPart, open_part
from tenants.postgres_account import make_directory

if TYPE_CHECKING:
    from service.backup.key import BackupKey
    from service.backup.store import Store

PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model."""

    path: str
    """Relative to the model's folder, with `/`."""
    sha256: str
    size_bytes: int
    mode: int
    """Permission bits."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model's name, and its files; none where they are not on this host."""

    name: str
    files: tuple[ModelFile, ...]

    def pack(self) -> bytes:
        return orjson.dumps({"name": self.name, "files": [asdict(file) for file in self.files]})

    @classmethod
    def unpack(cls, data: bytes) -> Model:
        """Raises `BackupDamaged`."""
        try:
            told = orjson.loads(data)
            model = cls(str(told["name"]), tuple(ModelFile(**file) for file in told["files"]))
        except (ValueError, KeyError, TypeError) as exc:
            raise BackupDamaged("the list of the model's files cannot be read") from exc
        for file in model.files:
            parts = PurePosixPath(file.path).parts
            if not parts or ".." in parts or parts[0] == "/":
                raise BackupDamaged("the list of the model's files leads out of its folder")
        return model


def folder_of(name: str) -> Path | None:
    """Where the files of `PERICARP_MODEL` are on this host; None where they would have to be fetched."""
    if name == DEMO:
        return DEMO_DIRECTORY
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def keep_model(store: Store, key: BackupKey, name: str, told: Callable[[int], None]) -> Model:
    """Store what the store does not have yet of a model's files. `told` hears of bytes that were looked at.

    Raises `BackupRefused` where a file cannot be read or changes meanwhile, `StoreFailed`.
    """
    folder = folder_of(name)
    if folder is None:
        return Model(name, ())
    files = []
    try:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            with path.open("rb") as file:
                digest = _digest(file, told)
                if store.read(_whole(key, digest)) is None:
                    file.seek(0)
                    _keep(store, key, digest, file)
                found = path.stat()
            relative = path.relative_to(folder).as_posix()
            files.append(ModelFile(relative, digest, found.st_size, stat.S_IMODE(found.st_mode)))
    except OSError as exc:
        raise BackupRefused(f"the model's files cannot be read: {exc.strerror}") from exc
    return Model(name, tuple(files))


def check_model(store: Store, key: BackupKey, model: Model, told: Callable[[int], None]) -> None:
    """Read every file back. Raises `BackupDamaged`, `StoreFailed`."""
    for file in model.files:
        _read(store, key, file, _Nowhere(), told)


def restore_model(
    store: Store, key: BackupKey, model: Model, folder: Path, told: Callable[[int], None]
) -> None:
    """Write a model's files into a folder, with their modes; those that are there already, whole, are kept.

    Raises `BackupDamaged`, `StoreFailed`, `OSError`.
    """
    for file in model.files:
        path = folder / file.path
        for above in (folder, *(folder / each for each in reversed(Path(file.path).parents[:-1]))):
            make_directory(above, 0o755)  # whom workers run as must get through
        if path.is_file():
            with path.open("rb") as there:
                if hashlib.file_digest(there, "sha256").hexdigest() == file.sha256:
                    told(file.size_bytes)
                    continue
        draft = path.with_name(f".{path.name}.draft")
        with draft.open("wb") as out:
            _read(store, key, file, out, told)
        draft.chmod(file.mode)
        draft.replace(path)


def stored_digests(store: Store, key: BackupKey) -> list[str]:
    """Of every model file that is in the store, whole or not."""
    return store.folders(_place(key))


def remove_models(store: Store, key: BackupKey, digests: Sequence[str]) -> None:
    """What makes a file whole goes first, so that one that is half removed is none."""
    for digest in digests:
        store.remove([_whole(key, digest)])
        store.remove(store.sizes(f"{_place(key)}/{digest}"))


def _keep(store: Store, key: BackupKey, digest: str, file: IO[bytes]) -> None:
    place = f"{_place(key)}/{digest}"
    store.remove(store.sizes(place))  # what a run left that was cut off
    seen = hashlib.sha256()
    with SealedPart(store, f"{place}/content", key, key.context("model", digest)) as sealed:
        while data := file.read(PIECE_BYTES):
            seen.update(data)
            sealed.write(data)
    if seen.hexdigest() != digest:
        raise BackupRefused("a file of the model changed while it was stored")
    store.create(_whole(key, digest), orjson.dumps(asdict(sealed.part)))


def _read(
    store: Store, key: BackupKey, file: ModelFile, target: cobblestone.Writable, told: Callable[[int], None]
) -> None:
    place = f"{_place(key)}/{file.sha256}"
    whole = store.read(_whole(key, file.sha256))
    if whole is None:
        raise BackupDamaged(f"the model's file {file.path} is missing")
    try:
        part = Part(**orjson.loads(whole))
    except (ValueError, TypeError) as exc:
        raise BackupDamaged(f"{place}/whole cannot be read") from exc
    hashing = _Hashing(target, told)
    open_part(store, f"{place}/content", part, key, key.context("model", file.sha256), hashing)
    if hashing.digest.hexdigest() != file.sha256:
        raise BackupDamaged(f"the model's file {file.path} is another one")


class _Hashing:
    """Passes on what is written, and hashes it."""

    def __init__(self, target: cobblestone.Writable, told: Callable[[int], None]) -> None:
        self._target = target
        self._told = told
        self.digest = hashlib.sha256()

    def write(self, data: memoryview, /) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[self._target.write(rest) :]
        self.digest.update(data)
        self._told(len(data))
        return len(data)


class _Nowhere:
    """Takes everything."""

    def write(self, data: memoryview, /) -> int:
        return len(data)


def _digest(file: IO[bytes], told: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    while data := file.read(PIECE_BYTES):
        digest.update(data)
        told(len(data))
    return digest.hexdigest()


def _place(key: BackupKey) -> str:
    return f"{key.installation}/models"


def _whole(key: BackupKey, digest: str) -> str:
    return f"{_place(key)}/{digest}/whole"
