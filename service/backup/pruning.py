"""`backup prune`: what retention no longer keeps goes out of the store.

Kept are the newest full backups, as many as are to be kept, and all that came after the oldest of them; and the newest
backup that was read back without a doubt, with what it stands upon. So no kept backup loses what it needs. What was never
finished goes once a later backup was. Order is by sequence numbers, not by any clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.backup.fetching import fetch_small
from service.backup.manifest import FULL
from service.backup.model_files import remove_models, stored_digests
from service.backup.shelf import MANIFEST
from tenants.access import INSTALLATION

if TYPE_CHECKING:
    from service.backup.shelf import Shelf, Shelved
    from service.deeds import Actor
    from service.desk import Desk
    from tenants.backups import Known


@dataclass(frozen=True, slots=True)
class Plan:
    """What would go, and what stays."""

    kept: tuple[int, ...]
    removed: tuple[int, ...]
    unfinished: tuple[int, ...]
    """Numbers of runs that were cut off."""
    models: tuple[str, ...]
    """SHA-256 of files of models that no kept backup has."""


class Pruning:
    """Plans and removes."""

    def __init__(self, *, shelf: Shelf, desk: Desk) -> None:
        self._shelf = shelf
        self._desk = desk

    async def plan(self, keep: int) -> Plan:
        """Nothing is changed. Raises a `BackupError` where a backup that is to stay cannot be read."""
        return await asyncio.to_thread(self._plan, keep, await self._desk.backups.list())

    async def prune(self, actor: Actor, plan: Plan) -> None:
        """Say so in the log, then remove. What is cut off, the next prune removes. Raises `StoreFailed`."""
        gone = [*plan.removed, *plan.unfinished]
        if not gone and not plan.models:
            return
        async with self._desk.deeds.deed(actor, "backup_prune", tenant=INSTALLATION) as deed:
            deed.details = {
                "removed": list(plan.removed),
                "unfinished": list(plan.unfinished),
                "model_files": len(plan.models),
                "kept": len(plan.kept),
            }
            await self._desk.backups.note_pruned(plan.removed)
        await asyncio.to_thread(self._remove, gone, plan.models)

    def _plan(self, keep: int, known: Sequence[Known]) -> Plan:
        finished = self._shelf.finished()
        kept = {each.sequence: each for each in self._to_keep(finished, keep, known)}
        newest = finished[-1].sequence if finished else 0
        needed = {file.sha256 for each in kept.values() for file in fetch_small(self._shelf, each)[1].files}
        there = {each.sequence for each in finished}
        return Plan(
            kept=tuple(sorted(kept)),
            removed=tuple(each for each in sorted(there) if each not in kept),
            unfinished=tuple(each for each in self._shelf.sequences() if each not in there and each < newest),
            models=tuple(
                each for each in stored_digests(self._shelf.store, self._shelf.key) if each not in needed
            ),
        )

    def _to_keep(self, finished: Sequence[Shelved], keep: int, known: Sequence[Known]) -> Sequence[Shelved]:
        fulls = [each.sequence for each in finished if each.manifest.kind == FULL]
        first = fulls[-keep] if len(fulls) >= keep else 0
        kept = [each for each in finished if each.sequence >= first]
        verified = {str(each.id) for each in known if each.verified_at is not None}
        last_verified = next((each for each in reversed(finished) if each.manifest.id in verified), None)
        if last_verified is not None:
            kept += self._shelf.chain(last_verified)
        return kept

    def _remove(self, sequences: Sequence[int], models: Sequence[str]) -> None:
        for sequence in sequences:
            manifest = self._shelf.path(sequence, MANIFEST)
            self._shelf.store.remove([manifest])  # first, so that what is half removed is no backup
            self._shelf.store.remove(self._shelf.store.sizes(manifest.rpartition("/")[0]))
        remove_models(self._shelf.store, self._shelf.key, models)
