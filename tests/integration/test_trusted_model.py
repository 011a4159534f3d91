"""A sealed and signed model is served, its name and manifest are in the log, and a changed byte stops it before it serves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import cobblestone
from models import Trust
from models.folder import Folder
from models.manifest import SIGNATURE, Manifest, public_der, sign
from models.sealed_folder import seal_folder
from tests.integration.conftest import Secrets
from tests.integration.served import Served, serve, until
from tests.tiny_qwen import save_checkpoint

ASK = {"query": "red shoe", "documents": ["a red shoe", "something else"]}
KEY = generate_private_key(SECP256R1())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed and sealed, beside its two keys."""
    above = tmp_path_factory.mktemp("trusted")
    plain = save_checkpoint(above / "plain")
    files = Folder(plain, "tiny").check().files
    (plain / SIGNATURE).write_bytes(sign(Manifest(files, "tiny-1"), KEY, name="tiny"))
    seal_key = cobblestone.new_key()
    (above / "seal.key").write_text(seal_key.hex())
    (above / "model.pub").write_bytes(
        KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    trust = Trust(public_der(KEY.public_key()))
    seal_folder(Folder(plain, "tiny", trust), above / "tiny", seal_key, told=lambda done, size: None)
    return above / "tiny"


@pytest.fixture(scope="module")
def trusted(app_url: str, installation_secrets: Secrets, folder: Path) -> Iterator[Served]:
    with serve(
        app_url,
        *installation_secrets.keys,
        puppet=False,
        model=str(folder),
        device="cpu",
        dtype="fp32",
        worker_threads=1,
        spare_workers=0,
        share_weights=False,  # so that each worker reads them
        model_key=folder.parent / "model.pub",
        model_seal_command=("/bin/cat", str(folder.parent / "seal.key")),
    ) as served:
        yield served


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def test_a_sealed_model_serves_and_is_named_until_a_byte_of_it_changes(trusted: Served, folder: Path) -> None:
    name, key = trusted.search_key()
    answer = trusted.rerank(ASK, key)
    assert answer.status_code == 200, answer.text
    manifest = Folder(folder.parent / "plain", "tiny").check().digest
    with trusted.client("") as client:
        told = client.get("/readyz").json()["model"]
    assert (told["id"], told["manifest"], told["revision"]) == ("tiny", manifest, "tiny-1")
    (entry,) = trusted.entries(name)
    assert entry["details"]["model"] == {"manifest": manifest, "revision": "tiny-1"}
    assert (entry["model"], entry["model_digest"]) == ("tiny", told["digest"])
    (worker,) = [each.pid for each in trusted.fleet.workers() if each.tenant]
    seal_key = (folder.parent / "seal.key").read_text()
    shown = Path(f"/proc/{worker}/cmdline").read_bytes()
    if os.geteuid() == 0:  # who is not may not look at all
        shown += Path(f"/proc/{worker}/environ").read_bytes()
    assert seal_key.encode() not in shown and bytes.fromhex(seal_key) not in shown

    flip(folder / "model.safetensors.sealed")
    os.kill(worker, signal.SIGKILL)
    until(lambda: not trusted.fleet.workers())
    answer = trusted.rerank(ASK, key)
    assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable"), answer.text
    assert int(answer.headers["Retry-After"]) >= 1
    with trusted.client("") as client:
        ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["reason"]) == (503, "worker")
    assert "model.safetensors of model" in ready.json()["detail"]
    for text in (answer.text, ready.text):
        assert str(folder.parent) not in text
