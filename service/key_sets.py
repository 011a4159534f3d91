"""The keys of identity providers, fetched beside the requests, never in one.

A file is read again when it changes, a URL every five minutes and, where a token named a key that is not there, at most
every ten seconds. Keys that were good stay good for an hour while their provider does not answer; after that its
tokens are refused (503). Only https, no redirects, no body above 512 KiB.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service.watch.logs import get_logger
from tenants.errors import KeySetInvalid
from tenants.tokens import KEY_SET_BYTES, read_key_set

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenants.identities import Issuer
    from tenants.tokens import KeySet, Tokens

LOOK_EVERY_S = 1.0
REFRESH_S = 300.0
AGAIN_S = 10.0
"""Between two fetches of one issuer at least."""
TRUSTED_S = 3_600.0
"""How long keys serve that cannot be fetched anew."""
FETCH_S = 10.0

log = get_logger(__name__)


@dataclass(slots=True)
class Source:
    """Where one issuer's keys come from, and how they stand."""

    issuer: Issuer
    tried_s: float = float("-inf")
    fetched_s: float = float("-inf")
    stamp: tuple[int, int] | None = None
    keys: KeySet | None = None


class KeySets:
    """Keeps `Tokens` in keys for as long as `keep` runs."""

    def __init__(
        self, issuers: tuple[Issuer, ...], tokens: Tokens, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tokens = tokens
        self._sources = [Source(issuer) for issuer in issuers]
        self._clock = clock

    async def keep(self) -> None:
        """Fetch what is due, until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Fetch what is due now. One provider that is slow keeps no other waiting."""
        await asyncio.gather(*(self._look_at(source) for source in self._sources))

    async def _look_at(self, source: Source) -> None:
        name = source.issuer.name
        if self._is_due(source):
            self._tokens.wanted.discard(name)
            source.tried_s = self._clock()
            try:
                keys = read_key_set(await asyncio.to_thread(_fetch, source.issuer))
            except (OSError, ValueError, KeySetInvalid) as exc:
                log.warning(
                    "an issuer's keys could not be fetched",
                    action="issuer_keys_failed",
                    issuer=name,
                    error=type(exc).__name__,
                )
            else:
                source.fetched_s = self._clock()
                if keys_names(keys) != keys_names(source.keys):
                    log.info("an issuer has new keys", action="issuer_keys", issuer=name, count=len(keys))
                source.keys = keys
                self._tokens.give(name, keys)
        if source.keys is not None and self._clock() - source.fetched_s > TRUSTED_S:
            source.keys = None
            self._tokens.give(name, None)

    def _is_due(self, source: Source) -> bool:
        now = self._clock()
        if source.issuer.keys_file is not None:
            stamp = _stamp(source.issuer.keys_file)
            changed, source.stamp = stamp != source.stamp, stamp
            # Also while nothing changes: a file that stands still is as good as fetched.
            return changed or now - source.tried_s >= REFRESH_S
        wanted = source.issuer.name in self._tokens.wanted or source.keys is None
        return now - source.tried_s >= (AGAIN_S if wanted else REFRESH_S)


def keys_names(keys: KeySet | None) -> list[str]:
    """The ids of keys, in order."""
    return sorted(key.kid for key in keys or ())


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _fetch(issuer: Issuer) -> bytes:
    """The key set as it is served now; blocking. Raises OSError, ValueError."""
    if issuer.keys_file is not None:
        with Path(issuer.keys_file).open("rb") as file:
            return file.read(KEY_SET_BYTES + 1)
    assert issuer.keys_url is not None and issuer.keys_url.startswith("https://")
    context = ssl.create_default_context(cafile=issuer.keys_ca)
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(context=context),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),  # a redirect is an error: nobody follows it
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(issuer.keys_url, headers={"Accept": "application/json"})  # noqa: S310
    with opener.open(request, timeout=FETCH_S) as answer:
        body: bytes = answer.read(KEY_SET_BYTES + 1)
    return body
