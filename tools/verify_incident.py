#!/usr/bin/env python3
"""Check what `incident export` wrote, without trusting who has it.

    python tools/verify_incident.py FOLDER --key VKEY [--witness VKEY]… [--threshold N] [--checkpoint OLD.note]…
        [--retention-days DAYS]

Needs Python 3.11, the package `cryptography`, and `verify.py` and `verify_pruned.py` beside it; nothing of Pericarp's. VKEY
is what `audit key` prints. A sealed export is opened first (`incident open`). Checked are the signature of the manifest, every
file by its size and digest, that there is no other, the log in it as `verify.py export` does, and that `entries.jsonl` is, to the
byte, what the log has of that time. Exit status 0: all holds; 1: what does not hold is named; 2: it cannot be read at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import uuid
from binascii import a2b_base64
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from verify import Export, Key, check_export, open_note, read_base64
from verify_pruned import ENTRY, Pruned, Unreadable, Wrong, read_lines

FORMAT = "pericarp-incident/v1"
MANIFEST = "MANIFEST"
LISTED = re.compile(r"([0-9a-f]{64}) (0|[1-9][0-9]{0,17}) ([a-z]+\.(?:json|jsonl|txt))")
NEEDED = {"configuration.json", "counts.json", "entries.jsonl", "incident.json", "log.jsonl", "tenants.json"}


def read_manifest(path: Path, key: Key) -> dict[str, tuple[str, int]]:
    """The digest and size of each file. Raises `Wrong`, `Unreadable`."""
    text, blank, signatures = path.read_bytes().decode("utf-8", "replace").rpartition("\n\n")
    lines = text.split("\n")
    if not blank or lines[0] != FORMAT or len(lines) < 4 or not signatures.endswith("\n"):
        raise Unreadable("MANIFEST is none of an incident")
    signed = False
    for line in signatures[:-1].split("\n"):
        parts = line.split(" ")
        if len(parts) != 3 or parts[0] != "—" or len(signature := read_base64(parts[2])) <= 4:
            raise Wrong("MANIFEST has a line that is no signature")
        if (parts[1], signature[:4]) == (key.name, key.id):
            key.check(signature[4:], f"{text}\n")
            signed = True
    if not signed or lines[1] != key.name:
        raise Wrong(f"MANIFEST is of the log {lines[1]}, or {key.name} has not signed it")
    files = {}
    for line in lines[3:]:
        if (found := LISTED.fullmatch(line)) is None or found[3] in files:
            raise Unreadable(f"a line of MANIFEST cannot be read: {line[:80]!r}")
        files[found[3]] = found[1], int(found[2])
    if missing := NEEDED - files.keys():
        raise Wrong(f"MANIFEST does not list {min(missing)}")
    return files


def check_files(folder: Path, files: dict[str, tuple[str, int]]) -> None:
    """That they are there as they were signed, and nothing else. Raises `Wrong`."""
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and path.name not in files:
            raise Wrong(f"{path.name} is not in the manifest")
    for name, (digest, size) in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise Wrong(f"{name} is missing, or no plain file")
        with path.open("rb") as file:
            if path.stat().st_size != size or hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise Wrong(f"{name} is not the file that was signed")


def check_entries(folder: Path) -> int:
    """That the entries are what the log has of that time, one by one and in its order. Raises `Wrong`, `Unreadable`."""
    told: dict[str, Any] = json.loads((folder / "incident.json").read_bytes())
    since, until = (in_microseconds(told["window"][name]) for name in ("from", "to"))
    expected = expect_entries(folder / "log.jsonl", since, until)
    count = 0
    for line in read_lines(folder / "entries.jsonl"):
        if line != next(expected, None):
            raise Wrong(f"entries.jsonl, line {count + 1}: not what the log has of that time")
        count += 1
    if (missing := next(expected, None)) is not None:
        raise Wrong(f"entries.jsonl lacks an entry of the log: {missing[:60]!r}")
    if told["entries"] != count or sum(each["count"] for each in read_counts(folder)) != count:
        raise Wrong("incident.json or counts.json tells of another number of entries")
    return count


def expect_entries(log: Path, since_us: int, until_us: int) -> Iterator[bytes]:
    for line in read_lines(log):
        if (entry := ENTRY.fullmatch(line)) is None:
            continue
        envelope = a2b_base64(entry[2])
        at_us = int.from_bytes(envelope[24:32], "big")
        if since_us <= at_us < until_us:
            at = datetime.fromtimestamp(at_us / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            ids = (str(uuid.UUID(bytes=envelope[place : place + 16])).encode() for place in (48, 32))
            yield b'{"id":"%s","tenant":"%s","recorded_at":"%s","body":%s}\n' % (
                *ids,
                at.encode(),
                entry[5] or b"null",
            )


def in_microseconds(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1e6)


def read_counts(folder: Path) -> list[dict[str, Any]]:
    counts: list[dict[str, Any]] = json.loads((folder / "counts.json").read_bytes())
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Check what was kept of an incident, without trusting who has it."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--key", required=True, help="the log's public key, as `audit key` prints it")
    parser.add_argument("--witness", action="append", default=[], help="the key of one that must cosign")
    parser.add_argument("--threshold", type=int, help="so many of the witnesses, instead of all")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="one that you kept")
    parser.add_argument(
        "--retention-days", type=int, default=1, help="how long bodies are to be kept at least"
    )
    options = parser.parse_args(arguments)
    try:
        key = Key.parse(options.key)
        witnesses = [Key.parse(text, 4) for text in dict.fromkeys(options.witness)]
        least = len(witnesses) if options.threshold is None else options.threshold
        if not bool(witnesses) <= least <= len(witnesses):
            raise Unreadable("a threshold is from 1 to the number of witnesses")
        check_files(options.folder, read_manifest(options.folder / MANIFEST, key))
        old = [open_note(path.read_text(encoding="utf-8"), key) for path in options.checkpoint]
        log = options.folder / "log.jsonl"
        pruned = Pruned(lambda: read_lines(log), options.retention_days)
        holds = check_export(log, Export(key, old, witnesses, least, pruned))
        print(
            f"{holds}\nThe manifest holds, and {check_entries(options.folder)} entries are all that the log has of that time."
        )
    except Wrong as exc:
        sys.stderr.write(f"WRONG: {exc}\n")
        return 1
    except (Unreadable, OSError, ValueError, KeyError, TypeError, OverflowError) as exc:
        sys.stderr.write(f"Cannot be read: {exc}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
