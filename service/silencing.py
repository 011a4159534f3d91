"""Silences with their entries: what the command line calls. Whatever is silenced stands in the installation's log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from service.watch.alerts import Matcher
from tenants.access import INSTALLATION
from tenants.errors import Fault, Invalid

if TYPE_CHECKING:
    from service.deeds import Actor, Deeds
    from tenants.silences import KeptSilence, Silences


class Silencing:
    """Silences alerts, and ends silences."""

    def __init__(self, *, deeds: Deeds, silences: Silences) -> None:
        self._deeds = deeds
        self._silences = silences

    async def add(
        self, actor: Actor, matchers: Sequence[str], *, lasts_s: float, by: str, comment: str
    ) -> KeptSilence:
        """Alerts that match all of these are told to nobody, for so long. Raises `Invalid` with every fault."""
        read = [str(matcher) for matcher in _read(matchers)]
        async with self._deeds.deed(actor, "alert_silence", tenant=INSTALLATION) as deed:
            silence = await self._silences.add(read, lasts_s=lasts_s, by=by, comment=comment)
            deed.details = {
                "silence": str(silence.id),
                "matchers": read,
                "ends_us": round(silence.ends_at.timestamp() * 1_000_000),
                "by": by,
                "comment": comment,
            }
        return silence

    async def end(self, actor: Actor, silence: UUID, *, by: str) -> KeptSilence:
        """End a silence now. Raises `SilenceNotFound`."""
        async with self._deeds.deed(actor, "alert_unsilence", tenant=INSTALLATION) as deed:
            deed.details = {"silence": str(silence), "by": by}
            return await self._silences.end(silence)


def _read(matchers: Sequence[str]) -> list[Matcher]:
    found, faults = [], []
    for text in matchers:
        try:
            found.append(Matcher.parse(text))
        except ValueError as exc:
            faults.append(Fault("matchers", f"{text[:64]!r}: {exc}"))
    if found and not any(matcher.operator in ("=", "=~") and matcher.value for matcher in found):
        faults.append(
            Fault("matchers", "would silence everything but something; name what to silence with = or =~")
        )
    if faults:
        raise Invalid(tuple(faults))
    return found
