"""`tools/verify.py` beside our own mathematics, beside vectors that others published, and on the example of its page."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants import merkle
from tenants.checkpoint import Checkpoint
from tenants.envelope import ENVELOPE_BYTES, Envelope
from tenants.errors import ProofInvalid
from tenants.sequencer import log_signer

ROOT = Path(__file__).resolve().parents[2]
VERIFY = ROOT / "tools" / "verify.py"
VECTORS = [
    vector
    for vector in json.loads((ROOT / "tests" / "assets" / "merkle_vectors.json").read_text())["inclusion"]
    if all(len(b64decode(vector[name] or "")) == 32 for name in ("leafHash", "root"))
    and vector["leafIdx"] >= 0
]
"""Those that can be asked at all: a leaf's hash is computed, a root was read as 32 bytes, an index as digits."""
SIGNER = log_signer(bytes(range(32)))


def load() -> Any:
    spec = importlib.util.spec_from_file_location("verify", VERIFY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["verify"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


verify = load()
ENVELOPES = st.builds(
    Envelope,
    schema_version=st.integers(0, 2**32 - 1),
    orphan=st.booleans(),
    recorded_at_us=st.integers(0, 2**64 - 1),
    tenant=st.uuids(),
    id=st.uuids(),
    request_id=st.uuids(),
    body_hash=st.binary(min_size=32, max_size=32),
)


@given(ENVELOPES)
def test_a_leaf_reads_back_equal(envelope: Envelope) -> None:
    data = envelope.pack()
    assert len(data) == ENVELOPE_BYTES
    assert Envelope.parse(data) == envelope


@given(ENVELOPES, st.integers(0, 15) | st.integers(20, 22), st.integers(0, 7))
def test_what_is_no_leaf_is_refused(envelope: Envelope, at: int, bit: int) -> None:
    data = bytearray(envelope.pack())
    data[at] ^= 1 << bit
    for wrong in (bytes(data), bytes(data[:-1]), b"", envelope.pack() + b"\0"):
        with pytest.raises(ProofInvalid):
            Envelope.parse(wrong)


def test_its_imports_are_the_standard_librarys_and_cryptography() -> None:
    imported = re.findall(r"^(?:from|import) (\w+)", VERIFY.read_text(), re.MULTILINE)
    assert {name for name in imported if name not in sys.stdlib_module_names} == {"cryptography"}


def test_trees_of_both_have_the_same_roots_and_tiles() -> None:
    leaves = [hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(70_000)]
    tiles = merkle.grow(0, leaves, lambda level, number: b"")
    tree = verify.Tree()
    checked = {1, 2, 3, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 70_000}
    assert tree.root == merkle.EMPTY_ROOT
    for leaf in leaves:
        tree.add(leaf)
        if tree.size in checked:
            assert tree.root == merkle.root(tree.size, lambda level, number: tiles[level, number])
    upper = {
        level: b"".join(hashes for (of, _), hashes in sorted(tiles.items()) if of == level)
        for level in (1, 2)
    }
    assert {level: b"".join(hashes) for level, hashes in tree.tiles.items()} == upper


@pytest.mark.parametrize("vector", VECTORS, ids=lambda each: each["name"])
def test_published_inclusion_vectors_are_decided_as_published(vector: dict[str, Any]) -> None:
    leaf, root = (b64decode(vector[name] or "") for name in ("leafHash", "root"))
    nodes = [b64decode(node) for node in vector["proof"] or ()]
    if vector["wantErr"]:
        with pytest.raises(verify.Wrong):
            verify.check_inclusion(leaf, vector["leafIdx"], vector["treeSize"], nodes, root)
    else:
        verify.check_inclusion(leaf, vector["leafIdx"], vector["treeSize"], nodes, root)


@given(st.integers(0, 2**60 - 1), st.binary(min_size=32, max_size=32), st.data())
def test_a_note_of_ours_is_read_and_one_with_a_changed_letter_is_not(
    size: int, root: bytes, data: st.DataObject
) -> None:
    key = verify.Key.parse(SIGNER.key.text)
    size %= 10**18
    note = SIGNER.sign(Checkpoint(SIGNER.key.name, size, root))
    assert verify.open_note(note, key) == (size, root)
    at = data.draw(st.integers(0, len(note) - 1))
    other = data.draw(st.characters(exclude_categories=["Cs"]).filter(lambda char: char != note[at]))
    with pytest.raises(verify.Wrong):
        verify.open_note(note[:at] + other + note[at + 1 :], key)


def test_the_receipt_in_its_page_holds(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "log.md").read_text()
    (receipt,) = re.findall(r"^```\n(c2sp\.org/tlog-proof@v1\n.*?)```$", page, re.MULTILINE | re.DOTALL)
    (key,) = re.findall(r"`(pericarp/log/[0-9a-f]{32}\+[^`]+)`", page)
    (asked,) = re.findall(r"/v1/receipts/([0-9a-f-]{36})", page)
    file = tmp_path / "receipt.tlog-proof"
    file.write_text(receipt, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", str(VERIFY), "receipt", str(file), "--key", key, "--id", asked],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"Entry {asked} is number 2 of the 4 entries" in done.stdout
