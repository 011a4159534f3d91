"""A model's folder: what may not lie in it, and that no byte is used but as it was signed."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cobblestone
from models import ModelRefused, Trust, weights
from models.folder import CODE, PICKLES, Folder
from models.manifest import SIGNATURE, Manifest, public_der, sign
from models.sealed_folder import seal_folder, unseal_folder
from models.sealed_memory import is_sealed

KEY = Ed25519PrivateKey.generate()
SIGNER = public_der(KEY.public_key())
SEAL_KEY = cobblestone.new_key()
SIGNED, SEALED = Trust(SIGNER), Trust(SIGNER, seal_key=SEAL_KEY)
HEADER = json.dumps({"w": {"dtype": "U8", "shape": [40_000], "data_offsets": [0, 40_000]}}).encode()
TENSORS = len(HEADER).to_bytes(8, "little") + HEADER + os.urandom(40_000)


def nobody(done: int, size: int) -> None:
    """Nobody looks at the progress."""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    directory = tmp_path / "plain"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(TENSORS)
    (directory / "docs").mkdir()
    (directory / "docs" / "card.md").write_text("A model.")
    write_signature(directory)
    return directory


@pytest.fixture
def sealed(plain: Path, tmp_path: Path) -> Path:
    seal_folder(Folder(plain, "m", SIGNED), tmp_path / "sealed", SEAL_KEY, told=nobody)
    return tmp_path / "sealed"


def write_signature(directory: Path, key: Ed25519PrivateKey = KEY) -> None:
    manifest = Folder(directory, "m").check()
    (directory / SIGNATURE).write_bytes(sign(Manifest(manifest.files, "r7"), key, name="m"))


def test_a_signed_model_is_found_as_it_was_signed(plain: Path, sealed: Path) -> None:
    unsigned = weights.find(str(plain))
    for directory, trust in ((plain, SIGNED), (sealed, SEALED)):
        found = weights.find(str(directory), trust=trust)
        assert (found.digest, found.hashes) == (unsigned.digest, unsigned.hashes)
        assert (found.revision, found.manifest) == ("r7", Folder(plain, "m").check().digest)
        assert found.contents == unsigned.contents
        (held,) = found.weights()
        assert held.read_bytes() == TENSORS
        assert is_sealed(found.held["model.safetensors"].descriptor)
        with pytest.raises(PermissionError):
            os.pwrite(found.held["model.safetensors"].descriptor, b"other weights", 0)
        with pytest.raises(OSError):
            held.write_bytes(b"other weights")
    assert unsigned.manifest == "" and unsigned.weights() == [plain / "model.safetensors"]


def test_no_plain_byte_of_a_sealed_model_is_on_the_disk(sealed: Path) -> None:
    everything = b"".join(path.read_bytes() for path in sealed.iterdir() if path.is_file())
    assert TENSORS[-100:] not in everything and b"qwen2_5_vl" not in everything


def test_unsealed_again_it_is_the_same(plain: Path, sealed: Path, tmp_path: Path) -> None:
    unseal_folder(Folder(sealed, "m", SEALED), tmp_path / "again", told=nobody)
    for path in plain.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(plain)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "model.safetensors", "docs/card.md", SIGNATURE]
)
@pytest.mark.parametrize("kind", ["plain", "sealed"])
def test_a_changed_byte_in_any_file_is_found(
    kind: str, file: str, plain: Path, sealed: Path, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(kind)
    trust = SIGNED if kind == "plain" else SEALED
    path = directory / file if kind == "plain" or file == SIGNATURE else directory / f"{file}.sealed"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelRefused):
        Folder(directory, "m", trust).check()
    if file != "docs/card.md":  # which no worker reads
        with pytest.raises(ModelRefused) as caught:
            weights.find(str(directory), trust=trust)
        assert str(plain.parent) not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda at: (at / "extra.json").write_text("{}"), "extra.json, which was not signed"),
        (lambda at: (at / "docs" / "more.md").write_text("x"), r"docs/more.md, which was not signed"),
        (lambda at: (at / ".hidden").write_text("x"), ".hidden, which was not signed"),
        (lambda at: (at / "docs" / "card.md").unlink(), "lacks docs/card.md"),
        (lambda at: (at / SIGNATURE).unlink(), "is not signed"),
        (lambda at: (at / SIGNATURE).write_text("{}"), "manifest cannot be read"),
        (lambda at: (at / "link").symlink_to("config.json"), "holds a link"),
        (lambda at: (at / "far").symlink_to("/etc"), "holds a link"),
        (lambda at: os.mkfifo(at / "pipe"), "no plain file"),
        (lambda at: (at / "config.json").chmod(0o666), "written by everybody"),
        (lambda at: (at / "docs").chmod(0o777), "written by everybody"),
        (lambda at: at.chmod(0o777), "written by everybody"),
        (lambda at: (at / SIGNATURE).chmod(0o666), "written by everybody"),
        (lambda at: write_signature(at, Ed25519PrivateKey.generate()), "another key"),
    ],
    ids=range(14),
)
def test_what_was_not_signed_is_refused(change: Callable[[Path], object], why: str, plain: Path) -> None:
    change(plain)
    with pytest.raises(ModelRefused, match=why):
        weights.find(str(plain), trust=SIGNED)


def test_what_the_specification_ignores_may_be_there_and_is_never_read(plain: Path) -> None:
    (plain / ".git").mkdir()
    (plain / ".git" / "hook.py").write_text("print()")
    (plain / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert weights.find(str(plain), trust=SIGNED).manifest


@pytest.mark.parametrize("suffix", sorted(PICKLES | CODE))
def test_pickles_and_code_are_refused_signed_or_not(suffix: str, plain: Path) -> None:
    (plain / "docs" / f"model{suffix.upper()}").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelRefused, match="may be a program"):
        weights.find(str(plain))
    with pytest.raises(ModelRefused, match="may be a program"):
        Folder(plain, "m").check()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2_5_vl", "auto_map": {"AutoModel": "modeling.Evil"}},
        {"model_type": "qwen2_5_vl", "vision_config": {"auto_map": {"AutoConfig": "x--y.Z"}}},
        {"model_type": "qwen2_5_vl", "custom_pipelines": {}},
    ],
)
def test_a_configuration_that_names_code_is_refused(config: object, plain: Path) -> None:
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match="names code"):
        weights.find(str(plain))
    with pytest.raises(ModelRefused, match="names code"):
        Folder(plain, "m").check()


def test_odd_headers_are_found_before_anybody_signs(plain: Path) -> None:
    (plain / "model.safetensors").write_bytes(TENSORS + b"#!/bin/sh\n")
    with pytest.raises(ModelRefused, match="odd header"):
        Folder(plain, "m").check()


def test_what_everybody_may_write_is_refused_without_a_key_too(plain: Path) -> None:
    (plain / "model.safetensors").chmod(0o646)
    with pytest.raises(ModelRefused, match="written by everybody"):
        weights.find(str(plain))


def test_hashes_that_are_known_must_be_those_that_were_signed(plain: Path) -> None:
    known = {"model.safetensors": weights.find(str(plain)).hashes["model.safetensors"]}
    found = weights.find(str(plain), known=known, trust=SIGNED)
    assert not found.held and found.manifest
    with pytest.raises(ModelRefused, match=r"model\.safetensors"):
        weights.find(str(plain), known={"model.safetensors": "0" * 64}, trust=SIGNED)


@pytest.mark.parametrize(
    ("trust", "why"),
    [
        (SIGNED, "no key to open it"),
        (Trust(seal_key=SEAL_KEY), "no key that must have signed"),
        (Trust(SIGNER, seal_key=cobblestone.new_key()), "not what was sealed under this key"),
    ],
)
def test_a_sealed_model_needs_its_keys(trust: Trust, why: str, sealed: Path) -> None:
    with pytest.raises(ModelRefused, match=why):
        weights.find(str(sealed), trust=trust)


def test_sealed_files_cannot_stand_for_each_other_nor_beside_plain_ones(plain: Path, sealed: Path) -> None:
    config, tokenizer = sealed / "config.json.sealed", sealed / "tokenizer.json.sealed"
    moved = tokenizer.read_bytes()
    tokenizer.write_bytes(config.read_bytes())
    with pytest.raises(ModelRefused, match="not what was sealed"):
        weights.find(str(sealed), trust=SEALED)
    tokenizer.write_bytes(moved)
    shutil.copy(plain / "config.json", sealed / "config.json")
    with pytest.raises(ModelRefused, match=r"config\.json is not"):
        weights.find(str(sealed), trust=SEALED)


def test_what_cannot_be_sealed_leaves_no_folder(plain: Path, sealed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelRefused, match="sealed already"):
        seal_folder(Folder(sealed, "m", SEALED), out, SEAL_KEY, told=nobody)
    with pytest.raises(ModelRefused, match="is not sealed"):
        unseal_folder(Folder(plain, "m", SIGNED), out, told=nobody)
    with pytest.raises(ModelRefused, match="not signed"):
        seal_folder(Folder(plain, "m"), out, SEAL_KEY, told=nobody)
    folder = Folder(plain, "m", SIGNED)
    (plain / "tokenizer.json").write_text("{ }")  # the last that is written
    with pytest.raises(ModelRefused, match="not the file that was signed"):
        seal_folder(folder, out, SEAL_KEY, told=nobody)
    assert not out.exists()
    with pytest.raises(FileExistsError):
        seal_folder(Folder(plain, "m", SIGNED), sealed, SEAL_KEY, told=nobody)
    assert (sealed / SIGNATURE).exists()


def test_a_signature_may_lie_elsewhere(plain: Path, tmp_path: Path) -> None:
    (plain / SIGNATURE).rename(tmp_path / "elsewhere.sig")
    found = weights.find(str(plain), trust=Trust(SIGNER, str(tmp_path / "elsewhere.sig")))
    assert found.manifest


def test_a_small_file_that_is_huge_is_not_read_into_memory(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.folder.SMALL_BYTES_MOST", 10_000)
    with pytest.raises(ModelRefused, match="far too large"):
        Folder(plain, "m").read("model.safetensors")
    target = io.BytesIO()
    Folder(plain, "m").pour("model.safetensors", target)
    assert target.getvalue() == TENSORS
