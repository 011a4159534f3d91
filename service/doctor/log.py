"""The log of decisions: its tree holds, nothing waits for long, and somebody else keeps its checkpoints."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from service.doctor.check import Finding, State, Unseen, judge
from service.known_witnesses import read_witnesses
from tenants.checkpoint import Checkpoint, open_checkpoint
from tenants.errors import LogBroken, ReceiptPending
from tenants.sequencer import log_signer

if TYPE_CHECKING:
    from service.desk import Desk
    from service.doctor.sight import Sight

LAG_S = 5.0
"""docs/log.md: within that time an entry is in the tree."""
LOOK_EVERY_S = 0.5


def look_at_tree(sight: Sight) -> Finding:
    """The newest checkpoint is signed by the log's key, and the stored tree leads to its root."""

    async def look(desk: Desk) -> Finding:
        try:
            tree, _ = await _look(desk)
        except LogBroken as exc:
            return Finding(
                State.BROKEN, str(exc), 'see docs/log.md, "When the log is broken"; change nothing before'
            )
        return Finding(State.HOLDS, f"{tree.size} entries")

    return sight.at_desk(look)


def look_at_lag(sight: Sight) -> Finding:
    """No entry waits for the tree for longer than is promised, while a service runs that puts it there."""

    async def look(desk: Desk) -> int | None:
        """The place of an entry that waits all the time that one may wait."""
        _, head = await _look(desk)
        until_s = time.monotonic() + LAG_S
        while head is not None and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_EVERY_S)
            _, now = await _look(desk)
            head = head if now == head else None
        return head

    waits = sight.at_desk(look)
    if waits is None:
        return Finding(State.HOLDS, f"none waits for {LAG_S:g} s")
    sight.readiness  # noqa: B018 - without a service, that they wait is no fault
    return Finding(
        State.BROKEN,
        f"entry {waits} waits for more than {LAG_S:g} s",
        "see the log's lines `log_failed` and `log_broken`, and whether the gateways have the same log-key",
    )


def look_at_witnesses(sight: Sight) -> Finding:
    """Witnesses are asked, and each has cosigned the newest checkpoint or one of the last minute before it."""
    known = read_witnesses(sight.settings.witnesses)
    if not known:
        return Finding(
            State.BROKEN,
            "no witness is asked: a forged log, or an older one, could be told from yours by nobody",
            "run `witness` on a host of somebody else, and set PERICARP_WITNESSES",
        )
    keys = [witness.key for witness in known]
    log_key = log_signer(sight.installation.log_key).key

    async def read(desk: Desk) -> str:
        try:
            return await desk.proofs.checkpoint()
        except ReceiptPending:
            raise Unseen("nothing is in the log's tree yet") from None

    opened = open_checkpoint(sight.at_desk(read), [log_key, *keys], origin=log_key.name)
    missing = [key.name for key in keys if key not in opened.signers]
    try:
        standing = sight.readiness.get("witnesses", {})
    except Unseen:
        standing = {}
    faults = [f"{name} has not cosigned it" for name in missing]
    faults += [
        f"{name} is {state}" for name, state in standing.items() if state not in ("ok", "not asked yet")
    ]
    return judge(
        faults,
        f"{len(keys)} of {len(keys)} have cosigned the tree of {opened.checkpoint.size} entries",
        'see docs/log.md, "Witnesses": what each state means and what to do',
    )


async def _look(desk: Desk) -> tuple[Checkpoint, int | None]:
    for _ in range(20):
        found = await desk.sequencer.look()
        if found is not None:
            return found
        await asyncio.sleep(LOOK_EVERY_S / 10)
    raise Unseen("another process integrates all the time")
