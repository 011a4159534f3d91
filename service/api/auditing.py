"""What proves the log to whoever asks: receipts, the newest checkpoint, and the tree as static files (C2SP tlog-tiles)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.requests import PROBLEMS, Responses, require
from service.errors import NotFound
from tenants.access import Scope
from tenants.merkle import TILE_WIDTH

if TYPE_CHECKING:
    from service.asks import Exchange
    from tenants.access import TenantId
    from tenants.backups import Backups
    from tenants.proofs import Proofs

TILE_PATH = re.compile(r"(?P<number>(?:x[0-9]{3}/)*[0-9]{3})(?:\.p/(?P<width>[1-9][0-9]{0,2}))?")
LEVEL = re.compile(r"[0-9]|[1-5][0-9]|6[0-3]")
NO_TILE = "The tree has no such tile."
TEXT: Responses = {200: {"content": {"text/plain": {}}, "description": "Text, as C2SP's page defines it."}}
BYTES: Responses = {200: {"content": {"application/octet-stream": {}}, "description": "Bytes."}}
REFUSALS: Responses = {status: PROBLEMS[status] for status in (401, 403, 404, 503)}


def build_auditing_router(*, proofs: Proofs, backups: Backups) -> APIRouter:
    """The routes that prove the log."""
    router = APIRouter(tags=["log"])

    async def prove(tenant: TenantId, receipt_id: str) -> Response:
        proof = await proofs.prove(tenant, receipt_id)
        backup = await backups.of_leaf(proof.index)
        return _text(proof.text, {"Pericarp-Backup": "none" if backup is None else str(backup)})

    @router.get("/v1/receipts/{receipt_id}", responses={**TEXT, **REFUSALS}, summary="The proof of a receipt")
    async def prove_to_caller(request: Request, receipt_id: str) -> Response:
        """A C2SP tlog-proof of the entry whose id an answer's `Pericarp-Receipt` told, offline verifiable.

        404 `receipt_pending` until the entry is in the tree, within 5 s. `Pericarp-Backup` is the number of the first
        backup that has the entry, or `none`. Asking is not charged.
        """
        caller = require(_begin(request, "receipt"), "search")
        return await prove(caller.tenant, receipt_id)

    @router.get(
        "/audit/v1/receipts/{receipt_id}",
        responses={**TEXT, **REFUSALS},
        summary="The same for administrators' and auditors' keys",
    )
    async def prove_to_auditor(request: Request, receipt_id: str) -> Response:
        """Of the key's own tenant."""
        caller = _begin(request, "audit.receipt").known_caller
        return await prove(caller.tenant, receipt_id)

    @router.get("/audit/v1/checkpoint", responses={**TEXT, **REFUSALS}, summary="The newest checkpoint")
    async def tell_checkpoint(request: Request) -> Response:
        """A C2SP checkpoint: the log's origin, the tree's size and root, signed. For every administrators' key."""
        _begin(request, "audit.checkpoint")
        return _text(await proofs.checkpoint())

    @router.get(
        "/audit/v1/tile/{level}/{path:path}",
        responses={**BYTES, **REFUSALS},
        summary="A tile of the tree, or the leaves below one (platform_admin keys with the scope audit)",
    )
    async def read_tile(request: Request, level: str, path: str) -> Response:
        """`tile/<L>/<N>[.p/<W>]` and `tile/entries/<N>[.p/<W>]` as C2SP tlog-tiles has them."""
        require(_begin(request, "audit.tile"), "platform_admin", Scope.AUDIT)
        number, width = _read_path(path)
        if level == "entries":
            found = await proofs.bundle(number, width)
        elif LEVEL.fullmatch(level):
            found = await proofs.tile(int(level), number, width)
        else:
            found = None
        if found is None:
            raise NotFound(NO_TILE)
        # What a tile holds never changes.
        return Response(
            found,
            media_type="application/octet-stream",
            headers={"Cache-Control": "private, max-age=31536000, immutable"},
        )

    return router


def _begin(request: Request, operation: str) -> Exchange:
    exchange: Exchange = request.state.exchange
    exchange.operation = operation
    return exchange


def _text(text: str, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    return Response(
        text, media_type="text/plain; charset=utf-8", headers={"Cache-Control": "no-store", **headers}
    )


def _read_path(path: str) -> tuple[int, int]:
    """Number and width: `x001/x234/067.p/5` is the first 5 of number 1,234,067. Raises `NotFound` for any other way."""
    match = TILE_PATH.fullmatch(path)
    if match is None:
        raise NotFound(NO_TILE)
    digits = match["number"].replace("x", "").replace("/", "")
    width = int(match["width"] or TILE_WIDTH)
    if (len(digits) > 3 and digits.startswith("000")) or len(digits) > 15 or width > TILE_WIDTH:
        raise NotFound(NO_TILE)
    if match["width"] is not None and width == TILE_WIDTH:
        raise NotFound(NO_TILE)
    return int(digits), width
