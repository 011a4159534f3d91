"""Has the log's newest checkpoint cosigned by every witness, every few seconds (C2SP tlog-witness, as its client).

No answer, no receipt and no step of the sequencer waits for a witness: one that is away is told, in the log, the metrics
and `/readyz`. One that refuses because the log is not the one that it has seen is the alarm that it is there for.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpcore2

from service.watch import metrics
from service.watch.logs import get_logger, where_it_broke
from tenants.checkpoint import read_decimal
from tenants.errors import DatabaseUnavailable, LogBroken, ProofInvalid

if TYPE_CHECKING:
    from service.known_witnesses import KnownWitness
    from tenants.checkpoint import Submission
    from tenants.cosignatures import Cosignatures

LOOK_EVERY_S = 1.0
ANSWER_S = 5.0
ANSWER_BYTES = 16 * 1024
TRIES = 3
"""Submissions of one turn at most: a witness says what it knows, and other gateways ask it as well."""

OK = "ok"
UNASKED = "not asked yet"
AWAY = "away"
REFUSED = "refused"
INCONSISTENT = "inconsistent"
FAILED = "failed"

log = get_logger(__name__)


class _Away(Exception):
    """No answer that could be read."""


class _Refused(Exception):
    """An answer that is no cosignature, and nothing against the log."""


class _Inconsistent(Exception):
    """The log is not what the witness has cosigned."""


@dataclass(slots=True)
class _Standing:
    witness: KnownWitness
    state: str = UNASKED


class Cosigning:
    """One to a gateway. Of several gateways, whoever comes first asks a witness."""

    def __init__(self, cosignatures: Cosignatures, witnesses: tuple[KnownWitness, ...]) -> None:
        self._cosignatures = cosignatures
        self._standings = [_Standing(witness) for witness in witnesses]

    @property
    def standing(self) -> dict[str, str]:
        """Of every witness by its name: `ok`, `not asked yet`, `away`, `refused`, `inconsistent`, `failed`."""
        return {each.witness.key.name: each.state for each in self._standings}

    async def keep(self) -> None:
        """Ask the witnesses whenever there is something new, for ever. One that is slow keeps no other waiting."""
        if not self._standings:
            await asyncio.Event().wait()
        async with httpcore2.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(), keepalive_expiry=30.0
        ) as pool:
            await asyncio.gather(*(self._keep(standing, pool) for standing in self._standings))

    async def _keep(self, standing: _Standing, pool: httpcore2.AsyncConnectionPool) -> None:
        while True:
            try:
                await self._turn(standing, pool)
            except DatabaseUnavailable:
                metrics.COSIGNING_FAILURES.labels("database").inc()  # /readyz says so of the database itself
            except LogBroken:
                metrics.COSIGNING_FAILURES.labels(
                    "broken"
                ).inc()  # the sequencer says what is, and signs nothing
            except Exception as exc:  # noqa: BLE001 - whatever it was, it is told, and tried again
                standing.state = FAILED
                metrics.COSIGNING_FAILURES.labels(FAILED).inc()
                log.error(
                    "a checkpoint could not be sent to a witness",
                    action="cosigning_failed",
                    witness=standing.witness.key.name,
                    error=type(exc).__name__,
                    where=where_it_broke(exc),
                )
            await asyncio.sleep(LOOK_EVERY_S)

    async def _turn(self, standing: _Standing, pool: httpcore2.AsyncConnectionPool) -> None:
        witness = standing.witness
        # Who does not know that all is well asks although nothing is new: this may be an older database than the witness
        # has seen, and what the database says of the witness as old. It takes an answer to be told `ok`.
        turn = await self._cosignatures.claim(witness.key, always=standing.state != OK)
        if not turn.claimed:
            if standing.state == OK:
                metrics.COSIGNED_SIZE.labels(witness.key.name).set(turn.cosigned)
            return
        try:
            size = await self._submit(witness, pool, turn.cosigned)
        except _Inconsistent as exc:
            self._fail(standing, INCONSISTENT, str(exc))
        except _Refused as exc:
            self._fail(standing, REFUSED, str(exc))
        except _Away as exc:
            self._fail(standing, AWAY, str(exc))
        else:
            standing.state = OK
            metrics.COSIGNED_SIZE.labels(witness.key.name).set(size)

    async def _submit(self, witness: KnownWitness, pool: httpcore2.AsyncConnectionPool, old: int) -> int:
        """Size of the tree that it has cosigned now. Raises `_Inconsistent`, `_Refused`, `_Away`."""
        for _ in range(TRIES):
            found = await self._cosignatures.submission(old)
            if found is None:
                raise _Inconsistent(f"it has cosigned a tree of {old} leaves, and this log has fewer")
            submission, checkpoint = found
            status, body = await _post(pool, witness.url, submission)
            if status == 200:
                try:
                    await self._cosignatures.keep(witness.key, submission.note, body)
                except ProofInvalid as exc:
                    raise _Refused(f"its answer is not its cosignature: {exc}") from exc
                return checkpoint.size
            if status == 422:
                raise _Inconsistent(
                    f"this log's tree does not begin with the {old} leaves that it has cosigned"
                )
            if status != 409:
                raise _Refused(f"it answered {status}")
            try:
                known = read_decimal(body.removesuffix("\n"))
            except ProofInvalid as exc:
                raise _Refused("it answered 409 without a size") from exc
            if known == old == checkpoint.size:
                raise _Inconsistent(f"it has cosigned another tree of {old} leaves")
            if known < old:
                log.warning(
                    "a witness has forgotten what it cosigned",
                    action="cosigning_refused",
                    witness=witness.key.name,
                    reason="forgotten",
                    known=known,
                    cosigned=old,
                )
            old = known
        raise _Refused("it knows another size each time that it is asked")

    def _fail(self, standing: _Standing, state: str, reason: str) -> None:
        metrics.COSIGNING_FAILURES.labels(state).inc()
        if state != standing.state or state == INCONSISTENT:  # one line for all the time that it is away
            tell = log.critical if state == INCONSISTENT else log.warning
            tell(
                "a witness does not cosign",
                action="cosigning_refused" if state != AWAY else "cosigning_failed",
                witness=standing.witness.key.name,
                state=state,
                reason=reason,
            )
        standing.state = state


async def _post(pool: httpcore2.AsyncConnectionPool, url: str, submission: Submission) -> tuple[int, str]:
    """Status and body of the answer. Raises `_Away`. No redirect is followed, and no proxy asked."""
    try:
        async with (
            asyncio.timeout(ANSWER_S),
            pool.stream(
                "POST",
                f"{url}/add-checkpoint",
                headers={"Content-Type": "text/plain; charset=utf-8", "User-Agent": "pericarp"},
                content=submission.text.encode(),
            ) as response,
        ):
            body = bytearray()
            async for chunk in response.aiter_stream():
                body += chunk
                if len(body) > ANSWER_BYTES:
                    raise _Refused("its answer is too long")
            return response.status, body.decode()
    except UnicodeDecodeError as exc:
        raise _Refused("its answer is not UTF-8") from exc
    except (
        httpcore2.NetworkError,
        httpcore2.TimeoutException,
        httpcore2.ProtocolError,
        OSError,
    ) as exc:
        raise _Away(type(exc).__name__) from exc
