"""What is kept of an incident: a folder that proves by itself what it holds, for whoever has the log's public key.

    incident.json       what this is: whose, of which time, how many entries; versions of all that is installed
    log.jsonl           the log with its proofs and checkpoints, all of it or one tenant's part: as `audit export` writes it
    entries.jsonl       of these the entries of that time, to read
    counts.json         how many of them a minute, by operation, decision and code
    tenants.json        whom it is about: state, every version of the policy, keys without their secrets
    configuration.json  the settings in force here, without secrets
    metrics.txt         what the metrics said, where somebody has saved that
    MANIFEST            size and SHA-256 of each, signed by the log's key

`tools/verify_incident.py` checks it. The manifest is a signed note (C2SP signed-note) whose first line no checkpoint
can have. Sealed, each file is a ciphertext, and no plain byte of it is written.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from binascii import a2b_base64
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import distributions
from typing import IO, TYPE_CHECKING, Any, Final

import orjson

import cobblestone
from service import __version__
from tenants.access import INSTALLATION
from tenants.envelope import Envelope
from tenants.errors import LogBroken, ProofInvalid
from tenants.log_export import export_log
from tenants.sequencer import log_signer

if TYPE_CHECKING:
    from pathlib import Path

    from service.deeds import Actor
    from service.desk import Desk
    from service.installation import Installation
    from service.settings import Settings
    from tenants.checkpoint import Signer
    from tenants.directory import Tenant

FORMAT: Final = "pericarp-incident/v1"
"""The manifest's first line: a checkpoint begins with its log's name."""
SEALED = ".sealed"
MANIFEST = "MANIFEST"

Told = Callable[[int, int], None]
"""How many leaves of the log of how many are written."""
_LEAF = re.compile(rb'\{"index":\d+,"envelope":"([^"]+)"(?:,"row":"[^"]+")?(?:,"body":(.+))?')


@dataclass(frozen=True, slots=True)
class Window:
    """Entries that were recorded from `since` on, and before `until`; by the database's clock."""

    since: datetime
    until: datetime

    def __contains__(self, at_us: int) -> bool:
        return round(self.since.timestamp() * 1e6) <= at_us < round(self.until.timestamp() * 1e6)


@dataclass(slots=True)
class Parcel:
    """A folder that is being filled; `listed` has a line of the manifest for each file."""

    folder: Path
    key: bytes | None = field(repr=False)
    listed: list[str] = field(default_factory=list)

    def open(self, name: str, stack: ExitStack) -> _File:
        """A new file, whole once `stack` is left. Raises `OSError`."""
        path = self.folder / (f"{name}{SEALED}" if self.key else name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        target = stack.enter_context(os.fdopen(descriptor, "wb"))
        stack.callback(_keep, target)
        if self.key:
            return _File(stack.enter_context(cobblestone.Writer(target, self.key, seal_context(name))))
        return _File(target)

    def put(self, name: str, data: bytes) -> None:
        """One whole file."""
        with ExitStack() as stack:
            file = self.open(name, stack)
            file.write(data)
        self.enter(name, file)

    def enter(self, name: str, file: _File) -> None:
        """Have the manifest tell of it."""
        self.listed.append(f"{file.sha256.hexdigest()} {file.size} {name}\n")

    def close(self, signer: Signer, at: datetime) -> None:
        """Write the manifest: nothing comes after it."""
        text = "".join([f"{FORMAT}\n{signer.key.name}\n{_moment(at)}\n", *sorted(self.listed, key=_name)])
        self.put(MANIFEST, signer.sign_text(text).encode())


async def preserve(
    desk: Desk,
    found: Installation,
    settings: Settings,
    folder: Path,
    *,
    actor: Actor,
    window: Window,
    tenant: Tenant | None = None,
    metrics: bytes | None = None,
    key: bytes | None = None,
    told: Told,
) -> int:
    """Fill `folder`, which is empty and the caller's to remove where this raises; how many entries are of that time.

    It is about one `tenant`, or all; sealed where a `key` is given. An entry `admin.incident_export` says so before
    anything is read. A log that is broken is preserved as it is, and `incident.json` says what does not hold.
    Raises `DatabaseUnavailable`, `ReceiptPending`, `OSError`.
    """
    assert found.owner_url is not None, "the runtime role does not see all of the log"
    at = datetime.now(UTC)
    details = {"from": _moment(window.since), "to": _moment(window.until), "sealed": int(bool(key))}
    owner = INSTALLATION if tenant is None else tenant.id
    async with desk.deeds.deed(actor, "incident_export", tenant=owner) as deed:
        deed.details = details
    broken = await _integrate(desk)
    parcel = Parcel(folder, key)
    counts = await _put_log(parcel, found.owner_url, tenant, window, told)
    entries = sum(counts.values())
    parcel.put("counts.json", _dump([_tell_count(*each) for each in sorted(counts.items())]))
    about = [tenant] if tenant is not None else await desk.directory.list_tenants()
    parcel.put("tenants.json", _dump([await _describe(desk, each) for each in about]))
    parcel.put("configuration.json", _dump(settings.tell()))
    if metrics is not None:
        parcel.put("metrics.txt", metrics)
    signer = log_signer(found.log_key)
    what = {
        "format": FORMAT,
        "log": signer.key.name,
        "log_broken": broken,
        "created_at": _moment(at),
        "tenant": None if tenant is None else {"id": str(tenant.id), "name": tenant.name},
        "window": {"from": details["from"], "to": details["to"]},
        "entries": entries,
        "exported_by": actor.role,
        "entry_of_this_export": actor.receipt,
        "versions": _versions(),
    }
    parcel.put("incident.json", _dump(what))
    parcel.close(signer, at)
    return entries


def unseal(folder: Path, out: Path, key: bytes) -> None:
    """Write the plain files of a sealed folder to `out`, a new one. Raises `cobblestone.NotAuthentic` and `OSError`.

    What they hold is for `tools/verify_incident.py` to judge.
    """
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(SEALED)
        with path.open("rb") as source, (out / name).open("xb") as target:
            cobblestone.decrypt(source, target, key, seal_context(name))


def seal_context(name: str) -> bytes:
    """What a sealed file's ciphertext is bound to: that it is this file of an incident."""
    return f"{FORMAT}\0{name}".encode()


class _File:
    """Counts and hashes what is written, which is plain."""

    def __init__(self, target: Any) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._target = target

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.size += len(data)
        self._target.write(data)


def _keep(file: IO[bytes]) -> None:
    """On the disk, whatever happens next."""
    file.flush()
    os.fsync(file.fileno())


async def _put_log(
    parcel: Parcel, owner_url: str, tenant: Tenant | None, window: Window, told: Told
) -> Counter[tuple[str, str, str, str]]:
    """The log and, of what was recorded in the window, the entries; these by minute, operation, decision and code."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    with ExitStack() as stack:
        log, entries = parcel.open("log.jsonl", stack), parcel.open("entries.jsonl", stack)
        async for line in export_log(owner_url, tenant=None if tenant is None else tenant.name, told=told):
            log.write(line)
            if (leaf := _LEAF.match(line)) is None:
                continue
            try:
                envelope = Envelope.parse(a2b_base64(leaf[1]))
            except (ValueError, ProofInvalid):
                continue  # whoever verifies the log will name it
            if envelope.recorded_at_us not in window:
                continue
            body = leaf[2][:-1] if leaf[2] else b"null"  # pruned; or of a kind that we never write
            at = datetime.fromtimestamp(envelope.recorded_at_us / 1e6, UTC)
            entries.write(
                b'{"id":"%s","tenant":"%s","recorded_at":"%s","body":%s}\n'
                % (str(envelope.id).encode(), str(envelope.tenant).encode(), _moment(at).encode(), body)
            )
            read = orjson.loads(body) or {}
            operation, decision, code = (
                str(read.get(name, "")) for name in ("operation", "decision", "code")
            )
            counts[at.strftime("%Y-%m-%dT%H:%MZ"), operation, decision, code] += 1
    parcel.enter("log.jsonl", log)
    parcel.enter("entries.jsonl", entries)
    return counts


async def _integrate(desk: Desk) -> str | None:
    """Put what waits into the tree, for no service may be running; what is broken, where that cannot be done."""
    try:
        while (await desk.sequencer.step()).integrated:
            pass
    except LogBroken as exc:
        return str(exc)
    return None


async def _describe(desk: Desk, tenant: Tenant) -> dict[str, Any]:
    policies = await desk.directory.policies.history(tenant.id, most=1000)
    return {
        "tenant": {**_fields(tenant), "state": tenant.state},
        "policies": [
            {"version": each.version, "set_at": each.set_at, "policy": orjson.loads(each.policy.to_json())}
            for each in policies
        ],
        "keys": [_fields(each) for each in await desk.directory.keys.list(tenant.id)],
    }


def _versions() -> dict[str, Any]:
    packages = {each.metadata["Name"]: each.version for each in distributions()}
    return {
        "pericarp": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": dict(sorted(packages.items())),
    }


def _tell_count(what: tuple[str, str, str, str], count: int) -> dict[str, Any]:
    minute, operation, decision, code = what
    return {"minute": minute, "operation": operation, "decision": decision, "code": code, "count": count}


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _dump(value: object) -> bytes:
    return orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _name(line: str) -> str:
    return line.split(" ", 2)[2]
