#!/usr/bin/env python3
"""Check the log of a Pericarp installation without trusting it: its exports, its receipts.

    python tools/verify.py export EXPORT.jsonl --key VKEY [--checkpoint OLD.note]… [--witness VKEY]… [--threshold N]
        [--retention-days DAYS]
    python tools/verify.py receipt RECEIPT.tlog-proof --key VKEY [--witness VKEY]… [--threshold N] [--id ID] [--body FILE]

Needs Python 3.11 and the package `cryptography`, nothing of Pericarp's. VKEY is what `audit key` prints, got once and kept
where nobody can exchange it. An old checkpoint is one that you kept: the export must have grown out of it. DAYS is for how long
you know that bodies are to be kept at least. `verify_pruned.py` lies beside this file. Formats: docs/log.md. Exit status 0: all
holds; 1: the first thing that does not hold is named; 2: it cannot be read at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
import uuid
from base64 import b64encode
from binascii import a2b_base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

sys.path.insert(0, str(Path(__file__).resolve().parent))
from verify_pruned import ENTRY, ENVELOPE_BYTES, MAGIC, Pruned, Unreadable, Wrong, name_leaf, read_lines

TILE_WIDTH = 256
RECEIPT = re.compile(r"c2sp\.org/tlog-proof@v1\nextra (.+)\nindex (.+)\n((?:.+\n)*)\n")


class Key(NamedTuple):
    """A public key, of the log (kind 1) or a witness (4): `name+hex id+base64(kind ‖ public key)`, as C2SP signed-note has it."""

    name: str
    id: bytes
    kind: int
    public: Ed25519PublicKey

    @classmethod
    def parse(cls, text: str, kind: int = 1) -> Key:
        try:
            name, written_id, written = text.strip().split("+", 2)
            encoded = a2b_base64(written, strict_mode=True)
            public = Ed25519PublicKey.from_public_bytes(encoded[1:])
        except ValueError as exc:
            raise Unreadable("the key is not of the form NAME+ID+BASE64") from exc
        key_id = hashlib.sha256(name.encode() + b"\n" + encoded).digest()[:4]
        if encoded[0] != kind or key_id.hex() != written_id:
            raise Unreadable("the key's id does not belong to it, or it is of another kind")
        return cls(name, key_id, kind, public)

    def check(self, signature: bytes, text: str) -> None:
        """Raises `Wrong`."""
        if self.kind == 4:  # cosignature/v1: when the witness saw it, then what the log signed
            text = f"cosignature/v1\ntime {int.from_bytes(signature[:8], 'big')}\n{text}"
            signature = signature[8:]
        try:
            self.public.verify(signature, text.encode())
        except InvalidSignature:
            raise Wrong(f"its signature does not hold: {self.name}") from None


class Checkpoint(NamedTuple):
    size: int
    root: bytes


def open_note(note: str, key: Key, witnesses: Sequence[Key] = (), least: int = 0) -> Checkpoint:
    """The checkpoint of a note that `key` signed, and at least so many of the witnesses. Raises `Wrong`."""
    text, blank, signatures = note.rpartition("\n\n")
    lines = f"{text}\n".split("\n")
    if not blank or len(lines) != 4 or not signatures.endswith("\n"):
        raise Wrong("it is not a signed checkpoint")
    if lines[0] != key.name:
        raise Wrong(f"it is of the log {lines[0]}, not {key.name}")
    signed = set()
    for line in signatures[:-1].split("\n"):
        parts = line.split(" ")
        if len(parts) != 3 or parts[0] != "—" or len(signature := read_base64(parts[2])) <= 4:
            raise Wrong("it has a line that is no signature")
        for each in (key, *witnesses):
            if (parts[1], signature[:4]) == (each.name, each.id):
                each.check(signature[4:], f"{text}\n")
                signed.add(each.id)
    if key.id not in signed or len(root := read_base64(lines[2])) != 32:
        raise Wrong("the log's key has not signed it, or its root is not 32 bytes")
    if len(signed) <= least:
        raise Wrong(f"{len(signed) - 1} of {len(witnesses)} witnesses have cosigned it, not {least}")
    return Checkpoint(read_number(lines[1]), root)


def read_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or (text[0] == "0" and text != "0") or len(text) > 18:
        raise Wrong(f"{text[:30]!r} is not a number as it is to be written")
    return int(text)


def read_base64(text: str) -> bytes:
    try:
        found = a2b_base64(text.encode("ascii"), strict_mode=True)
    except ValueError:
        raise Wrong(f"{text[:30]!r} is not base64") from None
    if b64encode(found).decode() != text:
        raise Wrong(f"{text[:30]!r} is not base64 as it is to be written")
    return found


@dataclass
class Tree:
    """Grows leaf by leaf. Keeps the roots of whole subtrees at its right edge, and the hashes that tiles hold."""

    size: int = 0
    edge: list[bytes] = field(default_factory=list)
    tiles: dict[int, list[bytes]] = field(default_factory=dict)
    """By level from 1 on."""

    def add(self, leaf: bytes) -> None:
        height, node, number = 0, leaf, self.size
        while number & 1:
            node = hashlib.sha256(b"\1" + self.edge.pop() + node).digest()
            number >>= 1
            height += 1
            if not height & 7:
                self.tiles.setdefault(height >> 3, []).append(node)
        self.edge.append(node)
        self.size += 1

    @property
    def root(self) -> bytes:
        if not self.edge:
            return hashlib.sha256(b"").digest()
        node = self.edge[-1]
        for left in reversed(self.edge[:-1]):
            node = hashlib.sha256(b"\1" + left + node).digest()
        return node


def check_inclusion(leaf: bytes, index: int, size: int, nodes: list[bytes], root: bytes) -> None:
    """RFC 9162, section 2.1.3.2. Raises `Wrong`."""
    if index >= size:
        raise Wrong(f"index {index} is not below the tree's size, {size}")
    fn, sn, found = index, size - 1, leaf
    for node in nodes:
        if sn == 0 or len(node) != 32:
            raise Wrong("the proof has too many hashes, or one that is not 32 bytes")
        if fn & 1 or fn == sn:
            found = hashlib.sha256(b"\1" + node + found).digest()
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            found = hashlib.sha256(b"\1" + found + node).digest()
        fn, sn = fn >> 1, sn >> 1
    if sn:
        raise Wrong("the proof has too few hashes")
    if found != root:
        raise Wrong(f"entry {index} is not in the tree that was signed")


class Export:
    """Reads an export line by line, in one pass, and recomputes everything in it."""

    def __init__(
        self, key: Key, old: list[Checkpoint], witnesses: Sequence[Key], least: int, pruned: Pruned
    ) -> None:
        self.key, self.witnesses, self.least, self.pruned = key, witnesses, least, pruned
        self.old = sorted(old, key=lambda each: each.size)
        self.tree = Tree()
        self.entries = self.checkpoints = 0
        self.hidden = 0
        """Leaves that are told as hashes alone."""
        self.whole = self.bodies = True
        self.declared: Checkpoint | None = None
        self.tile = b""
        """Of level 0: what is left of the one that the next leaves belong to."""
        self.signed = 0
        """Size of the last checkpoint that held: what is wrong comes after it."""

    def read(self, line: bytes) -> None:
        """One line. Raises `Wrong`, `Unreadable`."""
        try:
            if (entry := ENTRY.fullmatch(line)) is not None:
                envelope = a2b_base64(entry[2], strict_mode=True)
                return self._entry(int(entry[1]), envelope, entry[5], entry[3], gone=entry[4] is not None)
            told: dict[str, Any] = json.loads(line)
            if "body64" in told:
                envelope, body = (a2b_base64(told[name], strict_mode=True) for name in ("envelope", "body64"))
                self._entry(told["index"], envelope, body, told.get("row"))
            elif "tile" in told:
                self._tile(told["tile"][0], told["tile"][1], a2b_base64(told["hashes"], strict_mode=True))
            elif "checkpoint" in told:
                self._checkpoint(told["checkpoint"])
            elif "unsequenced" in told:
                raise Wrong(f"entry {told['unsequenced']} of tenant {told['tenant']} is not in the tree")
            elif "beyond" in told:
                raise Wrong(f"index {told['beyond']} lies beyond the newest checkpoint")
            elif told.get("format") == "pericarp-log-export" and self.declared is None:
                self._begin(told)
            else:
                raise Unreadable(f"a line is of no kind that is known: {line[:80]!r}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise Unreadable(f"a line cannot be read ({exc}): {line[:80]!r}") from exc

    def end(self) -> None:
        """There is no more. Raises `Wrong`, `Unreadable`."""
        if self.declared is None:
            raise Unreadable("the export has no first line")
        self._hide_until(self.tree.size + len(self.tile) // 32)
        if self.tree.size != self.declared.size:
            raise Wrong(f"index {self.tree.size} is missing: the tree has {self.declared.size} entries")
        if self.tree.root != self.declared.root:
            raise Wrong(self._somewhere("does not lead to the root that was signed"))
        if self.signed != self.declared.size:
            raise Wrong(f"the checkpoint of the tree of {self.declared.size} entries is missing")
        if self.old:
            had = f"your old checkpoint {self.old[-1].size}"
            raise Wrong(f"the tree has {self.tree.size} entries, and {had}: entries are missing")
        for level, hashes in self.tree.tiles.items():
            if hashes:
                number = ((self.tree.size >> 8 * level) - len(hashes)) // TILE_WIDTH
                raise Wrong(f"tile {level}/{number} is missing")

    def _begin(self, told: dict[str, Any]) -> None:
        if told["version"] != 1:
            raise Unreadable(f"the export is of version {told['version']}")
        self.whole, self.bodies = told["whole"], told["bodies"]
        try:
            self.declared = open_note(told["note"], self.key, self.witnesses, self.least)
        except Wrong as exc:
            raise Wrong(f"the newest checkpoint: {exc}") from None
        self._meet_old()

    def _entry(
        self, index: int, envelope: bytes, body: bytes | None, row: object, gone: bool = False
    ) -> None:
        if index != self.tree.size:
            if self.whole or index < self.tree.size:
                raise Wrong(f"index {self.tree.size} is missing, or out of order: {index} comes there")
            self._hide_until(index)
        if not self.tile:
            raise Wrong(f"tile 0/{index // TILE_WIDTH} is missing")
        if len(envelope) != ENVELOPE_BYTES or envelope[:16] != MAGIC or envelope[20:24] > b"\0\0\0\1":
            raise Wrong(f"index {index}: not a leaf of this log")
        if row is not None:
            raise Wrong(f"index {index}: the stored row is not what was recorded{name_leaf(envelope)}")
        if gone:
            self.pruned.check_gone(index, envelope)
        elif self.bodies:
            if body is None:
                raise Wrong(f"index {index}: the body is missing{name_leaf(envelope)}")
            if hashlib.sha256(body).digest() != envelope[80:]:
                raise Wrong(f"index {index}: the body is not the one that was recorded{name_leaf(envelope)}")
            self.pruned.check_body(index, envelope, body)
        leaf = hashlib.sha256(b"\0" + envelope).digest()
        if leaf != self.tile[:32]:
            raise Wrong(f"index {index}: the leaf is not what was put into the tree{name_leaf(envelope)}")
        self.entries += 1
        self._add(leaf)

    def _tile(self, level: int, number: int, hashes: bytes) -> None:
        if level:
            mine = self.tree.tiles.get(level, [])
            if b"".join(mine[:TILE_WIDTH]) != hashes:
                raise Wrong(f"tile {level}/{number}: not what its leaves lead to")
            del mine[:TILE_WIDTH]
            return
        self._hide_until(number * TILE_WIDTH)
        if self.tree.size != number * TILE_WIDTH or self.tile or not hashes or len(hashes) % 32:
            raise Wrong(f"index {self.tree.size} is missing: tile 0/{number} comes before it")
        self.tile = hashes

    def _checkpoint(self, note: str) -> None:
        name = f"a checkpoint after index {self.signed - 1}" if self.signed else "the first checkpoint"
        try:
            checkpoint = open_note(note, self.key)
        except Wrong as exc:
            raise Wrong(f"{name}: {exc}") from None
        name = f"the checkpoint of the tree of {checkpoint.size} entries"
        if not self.whole:
            self._hide_until(checkpoint.size)
        if checkpoint.size != self.tree.size:
            late = f"{name} comes after {self.tree.size} entries"
            raise Wrong(f"index {self.tree.size} is missing" if checkpoint.size > self.tree.size else late)
        if checkpoint.root != self.tree.root:
            raise Wrong(self._somewhere(f"does not lead to the root of {name}"))
        self.signed = checkpoint.size
        self.checkpoints += 1

    def _hide_until(self, index: int) -> None:
        """Leaves that are not told, other tenants', count by their hash alone."""
        while not self.whole and self.tree.size < index and self.tile:
            self.hidden += 1
            self._add(self.tile[:32])

    def _add(self, leaf: bytes) -> None:
        self.tree.add(leaf)
        self.tile = self.tile[32:]
        if self.old and self.old[0].size == self.tree.size:
            self._meet_old()

    def _meet_old(self) -> None:
        while self.old and self.old[0].size == self.tree.size:
            if self.old.pop(0).root != self.tree.root:
                raise Wrong(f"an entry below index {self.tree.size} is not what it was at your checkpoint")

    def _somewhere(self, what: str) -> str:
        """Where leaves and their tile agree, an index cannot be named, but between which two checkpoints it is."""
        return f"from index {self.signed} on, below {self.tree.size}: something {what}"


def check_export(path: Path, export: Export) -> str:
    """What an export holds, in a few words. Raises `Wrong`, `Unreadable`."""
    watched = sys.stderr.isatty()
    with path.open("rb") as file:
        for line in file:
            export.read(line)
            if watched and export.declared and not export.tree.size & 1023:
                sys.stderr.write(f"\r{100 * export.tree.size // (export.declared.size or 1)} %\r")
    export.end()
    bodies = " with their bodies" if export.bodies else ""
    return (
        f"All holds: {export.entries} entries{bodies}, {export.hidden} leaves of others, {export.checkpoints} checkpoints of"
        f" {export.key.name}.\nThe tree has {export.tree.size} entries and the root {b64encode(export.tree.root).decode()}."
        + export.pruned.tell()
    )


def check_receipt(
    path: Path, key: Key, witnesses: list[Key], least: int, entry_id: str | None, body: Path | None
) -> str:
    """What a receipt proves, in a sentence. Raises `Wrong`, `Unreadable`."""
    text = path.read_bytes().decode("utf-8", "replace")
    if (found := RECEIPT.match(text)) is None:
        raise Unreadable("not a receipt: a tlog-proof with the leaf in its line `extra`")
    envelope, index = read_base64(found[1]), read_number(found[2])
    nodes = [read_base64(line) for line in found[3].split("\n")[:-1]]
    checkpoint = open_note(text[found.end() :], key, witnesses, least)
    check_inclusion(hashlib.sha256(b"\0" + envelope).digest(), index, checkpoint.size, nodes, checkpoint.root)
    if len(envelope) != ENVELOPE_BYTES or envelope[:16] != MAGIC:
        raise Wrong("what is proven is not a leaf of this log")
    if entry_id is not None and str(uuid.UUID(bytes=envelope[48:64])) != entry_id:
        raise Wrong(f"the receipt is of another entry{name_leaf(envelope)}")
    if body is not None and hashlib.sha256(body.read_bytes()).digest() != envelope[80:]:
        raise Wrong(f"the body is not the one that was recorded{name_leaf(envelope)}")
    recorded_s = time.gmtime(int.from_bytes(envelope[24:32], "big") // 1_000_000)
    return (
        f"Entry {uuid.UUID(bytes=envelope[48:64])} is number {index} of the {checkpoint.size} entries that {key.name} has"
        f" signed.\nTenant {uuid.UUID(bytes=envelope[32:48])}, request {uuid.UUID(bytes=envelope[64:80])}, recorded"
        f" {time.strftime('%Y-%m-%dT%H:%M:%SZ', recorded_s)}, SHA-256 of the body {envelope[80:].hex()}."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a log or a receipt without trusting who has it.")
    commands = parser.add_subparsers(dest="what", required=True)
    export = commands.add_parser("export", help="all of a log, or of one tenant's part of it")
    export.add_argument("--checkpoint", type=Path, action="append", default=[], help="one that you kept")
    export.add_argument(
        "--retention-days", type=int, default=1, help="how long bodies are to be kept at least"
    )
    receipt = commands.add_parser("receipt", help="one entry's proof")
    receipt.add_argument("--id", help="what `Pericarp-Receipt` said")
    receipt.add_argument("--body", type=Path, help="the entry's bytes, where you have them")
    for command in (export, receipt):
        command.add_argument("file", type=Path)
        command.add_argument("--key", required=True, help="the log's public key, as `audit key` prints it")
        command.add_argument("--witness", action="append", default=[], help="the key of one that must cosign")
        command.add_argument("--threshold", type=int, help="so many of the witnesses, instead of all")
    options = parser.parse_args(arguments)
    try:
        key = Key.parse(options.key)
        witnesses = [Key.parse(text, 4) for text in dict.fromkeys(options.witness)]
        least = len(witnesses) if options.threshold is None else options.threshold
        if not bool(witnesses) <= least <= len(witnesses):
            raise Unreadable("a threshold is from 1 to the number of witnesses")
        if options.what == "export":
            old = [open_note(path.read_text(encoding="utf-8"), key) for path in options.checkpoint]
            pruned = Pruned(lambda: read_lines(options.file), options.retention_days)
            print(check_export(options.file, Export(key, old, witnesses, least, pruned)))
        else:
            print(check_receipt(options.file, key, witnesses, least, options.id, options.body))
    except Wrong as exc:
        sys.stderr.write(f"WRONG: {exc}\n")
        return 1
    except (Unreadable, OSError, ValueError, OverflowError) as exc:
        sys.stderr.write(f"Cannot be read: {exc}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
