"""All of `/admin/v1` in one router."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends

from service.api.admin import shapes, threshold_shapes
from service.api.admin.entrance import Entrance, let_in
from service.api.admin.keys import build_keys_router
from service.api.admin.live import build_live_router
from service.api.admin.policies import build_policies_router
from service.api.admin.tenants import build_tenants_router
from service.api.admin.thresholds import build_thresholds_router
from service.api.admin.tokens import build_tokens_router

if TYPE_CHECKING:
    from service.bindings import Bindings
    from service.containment import Enforcement
    from service.desk import Desk

PREFIX = "/admin/v1"
BODIES = (*shapes.BODIES, *threshold_shapes.BODIES)
"""Read by ourselves, so the framework does not know them."""


def build_admin_router(
    *, desk: Desk, enforcement: Enforcement, bindings: Bindings, deadline_s: float
) -> APIRouter:
    """The administrators' routes. `deadline_s` is how long a body may take to arrive."""
    entrance = Entrance(
        database=desk.database, lifecycle=desk.lifecycle, repeats=desk.repeats, deadline_s=deadline_s
    )
    router = APIRouter(prefix=PREFIX, dependencies=[Depends(let_in)])
    router.include_router(
        build_tenants_router(
            entrance=entrance,
            administration=desk.administration,
            switch=desk.switch,
            enforcement=enforcement,
            directory=desk.directory,
        )
    )
    router.include_router(
        build_policies_router(
            entrance=entrance, administration=desk.administration, policies=desk.directory.policies
        )
    )
    router.include_router(
        build_keys_router(
            entrance=entrance,
            administration=desk.administration,
            switch=desk.switch,
            enforcement=enforcement,
            keys=desk.directory.keys,
        )
    )
    router.include_router(
        build_tokens_router(entrance=entrance, administration=desk.administration, denials=desk.denials)
    )
    router.include_router(
        build_live_router(
            entrance=entrance,
            administration=desk.administration,
            policies=desk.directory.policies,
            use=desk.use,
            sessions=desk.sessions,
            bindings=bindings,
            presences=desk.presences,
        )
    )
    router.include_router(
        build_thresholds_router(
            entrance=entrance,
            adapting=desk.adapting,
            reviews=desk.reviews,
            thresholds=desk.thresholds,
            canaries=desk.canaries,
        )
    )
    return router
