"""`create_app`: builds every object, lists the middleware, mounts the routers. Importing this does nothing."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from service import __version__
from service.alerting import build_alerting
from service.api.addresses import Proxies
from service.api.admin.router import build_admin_router
from service.api.auditing import build_auditing_router
from service.api.complaints import complaints, refuse
from service.api.documentation import document
from service.api.door import Door
from service.api.identify import Identify
from service.api.images import build_images_router
from service.api.inquiry.router import build_inquiry_router
from service.api.leaks import build_leaks_router
from service.api.metrics import MetricsPort, build_metrics_router
from service.api.moderations import build_moderations_router
from service.api.ranking import build_ranking_router
from service.api.search import build_router
from service.api.sessions import build_sessions_router
from service.api.usage import build_usage_router
from service.asks import Running
from service.bindings import Bindings
from service.clean import CleanImage
from service.containment import Enforcement
from service.cosigning import Cosigning
from service.custody import read_trust
from service.desk import build_desk
from service.errors import BadRequest, MethodNotAllowed, NotFound
from service.exposition import Exposition
from service.fleet.local import LocalFleet
from service.fleet.router import Party
from service.housekeeping import (
    BACKUPS_EVERY_S,
    ENFORCE_EVERY_S,
    FORGET_EVERY_S,
    REAP_EVERY_S,
    REPORT_EVERY_S,
    SWEEP_EVERY_S,
    TIDY_EVERY_S,
    beat,
    forget,
    reap,
    repeat,
    tell_backups,
    tidy,
)
from service.key_sets import KeySets
from service.known_witnesses import read_witnesses
from service.leaks import Leaks
from service.ledger import Ledger
from service.moderation import Moderation
from service.refusals import Refusals
from service.rerank import Rerank
from service.screening import ImageLimits
from service.screening.diary import hear
from service.screening.fetch import Fetcher, Network
from service.screening.messages import Equipment
from service.screening.pool import Screen
from service.screening.readers import Readers
from service.screening.recall import Recall
from service.screening.signals import Findings
from service.sequencing import Sequencing
from service.upkeep import Upkeep
from service.vetting import Seen, Vetting
from service.watch.metrics import name_tenants
from tenants.access import Access
from tenants.certificates import Certificates
from tenants.changes import Changes
from tenants.database import Database
from tenants.errors import InvalidIdentities
from tenants.evidence import Evidence
from tenants.identities import Identities, read_identities
from tenants.kept import KEPT_S
from tenants.tokens import Tokens
from tenants.uses import Uses

if TYPE_CHECKING:
    from starlette.requests import Request

    from service.fleet.router import Fleet
    from service.installation import Installation
    from service.settings import Settings


def create_app(
    settings: Settings,
    installation: Installation,
    *,
    keep_warm: tuple[Party, ...] = (),
    fleet: Fleet | None = None,
    network: Network | None = None,
) -> FastAPI:
    """The whole service as one ASGI application. `keep_warm` are parties whose workers never retire.

    Tests may replace the fleet, and the network that remote images come from; nothing else is ever replaced.
    """
    database = Database(installation.app_url)
    desk = build_desk(database, installation)
    audit, quotas, sessions = desk.audit, desk.quotas, desk.sessions
    running = Running(most_requests=settings.tenant_requests, most_body_bytes=settings.tenant_body_bytes)
    alerting = build_alerting(settings, desk)
    access = Access(database, pepper=installation.pepper, kept_s=KEPT_S)
    uses = Uses(database)
    refusals = Refusals(audit)
    evidence = Evidence(database)
    sequencing = Sequencing(desk.sequencer)
    cosigning = Cosigning(desk.cosignatures, read_witnesses(settings.witnesses))
    identities = read_identities(settings.identities.read_text()) if settings.identities else Identities()
    if identities.certificates and settings.client_ca is None:
        raise InvalidIdentities("certificates are mapped, but PERICARP_CLIENT_CA is not set")
    tokens = Tokens(identities.issuers)
    recall: Recall[Findings | Seen] = Recall()

    def changed(change: str) -> None:
        access.forget(change)
        audit.forget(change)
        recall.forget(change.removeprefix("tenant:"))

    def missed() -> None:
        access.forget_all()
        audit.forget_all()

    upkeep = Upkeep(
        changes=Changes(installation.app_url, changed=changed, missed=missed),
        uses=uses,
        refusals=refusals,
        evidence=evidence,
        sequencing=sequencing,
        cosigning=cosigning,
        alerting=alerting,
        key_sets=KeySets(identities.issuers, tokens) if identities.issuers else None,
    )
    identify = Identify(
        access=access,
        uses=uses,
        refusals=refusals,
        proxies=Proxies(settings.trusted_proxies),
        tokens=tokens if identities.issuers else None,
        certificates=Certificates(identities.certificates, ca_pem=settings.client_ca.read_bytes())
        if settings.client_ca
        else None,
        reads_client_cert=settings.client_cert_header,
    )
    ledger = Ledger(
        quotas=quotas,
        sessions=sessions,
        audit=audit,
        evidence=evidence,
        deadline_s=settings.deadline_s,
        model=settings.model_name,
    )
    screen = Screen(
        limits=ImageLimits(
            bytes=settings.image_limit_bytes,
            pixels=settings.image_limit_pixels,
            side=settings.image_limit_side,
            aspect=settings.image_limit_aspect,
            frames=settings.image_limit_frames,
        ),
        children=settings.screeners,
        timeout_s=settings.screening_s,
        equipment=Equipment(
            nets=settings.image_nets,
            text=settings.image_text,
            heads=str(settings.image_heads.resolve()) if settings.image_heads else None,
            plugins=settings.image_plugins,
        ),
        told=hear,
    )
    readers = Readers(timeout_s=settings.screening_s, told=hear)
    network = network or Network()
    fetch = Fetcher(
        image_bytes=settings.image_limit_bytes,
        request_bytes=settings.body_limit_bytes,
        deadline_s=settings.deadline_s,
        tls=ssl.create_default_context(cafile=settings.remote_image_ca),
        network=network,
    )
    serving = fleet or LocalFleet(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.worker_threads,
        memory_bytes=settings.worker_memory_bytes,
        max_workers=settings.max_workers,
        spare_workers=settings.spare_workers,
        idle_s=settings.worker_idle_s,
        start_s=settings.worker_start_s,
        queue_limit=settings.queue_limit,
        share_weights=settings.share_weights,
        weights_check_s=settings.weights_check_s,
        keep_warm=keep_warm,
        offline=settings.model_is_local,
        trust=read_trust(settings),
    )
    bindings = Bindings(sessions=sessions, fleet=serving)
    vetting = Vetting(screen=screen, readers=readers, recall=recall, fleet=serving)
    rerank = Rerank(
        ledger=ledger,
        vetting=vetting,
        fleet=serving,
        bindings=bindings,
        fetch=fetch,
        deadline_s=settings.deadline_s,
    )
    clean = CleanImage(ledger=ledger, screen=screen, fetch=fetch)

    enforcement = Enforcement(
        deeds=desk.deeds,
        lifecycle=desk.lifecycle,
        presences=desk.presences,
        audit=audit,
        fleet=serving,
        running=running,
    )
    exposition = Exposition(fleet=serving, screen=screen, readers=readers, sequencing=sequencing)
    metrics_port = MetricsPort(exposition, host=settings.metrics_host, port=settings.metrics_port)
    name_tenants(settings.metrics_tenants)
    chores = (
        (quotas.beat_s, partial(beat, quotas)),
        (REAP_EVERY_S, partial(reap, quotas)),
        (SWEEP_EVERY_S, bindings.sweep),
        (FORGET_EVERY_S, partial(forget, quotas)),
        (BACKUPS_EVERY_S, partial(tell_backups, desk.backups)),
        (ENFORCE_EVERY_S, enforcement.enforce),
        (REPORT_EVERY_S, enforcement.report),
        (
            TIDY_EVERY_S,
            partial(tidy, desk.administration, desk.repeats, desk.adapting, desk.erasing, evidence),
        ),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await database.open()
        try:
            upkeep.start()
            await quotas.extend_lease()
            await asyncio.gather(screen.start(), readers.start())
            await serving.start()
            await metrics_port.start()
            doing = [asyncio.create_task(repeat(every_s, work)) for every_s, work in chores]
            yield
            for task in doing:
                task.cancel()
        finally:
            await metrics_port.close()
            await serving.close()
            await asyncio.gather(screen.close(), readers.close())
            network.close()
            await upkeep.close()
            await database.close()

    app = FastAPI(
        title="Pericarp",
        version=__version__,
        summary="A multi-tenant multimodal rerank service.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(
                Door,
                identify=identify,
                ledger=ledger,
                running=running,
                observe=alerting.observe,
                body_limit_bytes=settings.body_limit_bytes,
            ),
        ],
        exception_handlers={HTTPException: _translate, RequestValidationError: _translate_parameters},
    )
    app.include_router(
        build_ranking_router(
            rerank=rerank,
            model=settings.model_name,
            aliases=frozenset(settings.model_aliases),
            deadline_s=settings.deadline_s,
        )
    )
    app.include_router(build_images_router(clean=clean, deadline_s=settings.deadline_s))
    app.include_router(
        build_router(
            fleet=serving,
            screen=screen,
            readers=readers,
            database=database,
            sequencing=sequencing,
            cosigning=cosigning,
            model=settings.model_name,
        )
    )
    if settings.metrics_port is None:
        app.include_router(build_metrics_router(exposition=exposition))
    app.include_router(
        build_sessions_router(
            ledger=ledger, sessions=sessions, bindings=bindings, deadline_s=settings.deadline_s
        )
    )
    moderation = Moderation(ledger=ledger, vetting=vetting, fetch=fetch, deadline_s=settings.deadline_s)
    app.include_router(build_moderations_router(moderation=moderation, deadline_s=settings.deadline_s))
    app.include_router(build_usage_router(quotas=quotas))
    app.include_router(build_auditing_router(proofs=desk.proofs, backups=desk.backups))
    app.include_router(
        build_leaks_router(
            leaks=Leaks(database=database, keys=desk.directory.keys, audit=audit, refusals=refusals),
            deadline_s=settings.deadline_s,
        )
    )
    app.include_router(
        build_admin_router(
            desk=desk, enforcement=enforcement, bindings=bindings, deadline_s=settings.deadline_s
        )
    )
    app.include_router(build_inquiry_router(inquiry=desk.inquiry, deadline_s=settings.deadline_s))
    document(app)
    app.state.fleet = serving
    app.state.enforcement = enforcement
    return app


async def _translate(_request: Request, exc: Exception) -> Response:
    """The framework's own refusals in our words; the door turns them into problem details."""
    assert isinstance(exc, HTTPException)
    if exc.status_code == 404:
        raise NotFound("There is no such path; /docs lists them.") from None
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "")
        raise MethodNotAllowed(
            f"This path takes {allowed}.", limit=allowed, headers={"Allow": allowed} if allowed else None
        ) from None
    raise BadRequest("The request cannot be read.") from None


async def _translate_parameters(_request: Request, exc: Exception) -> Response:
    """What the framework found wrong with a query, in our words: every parameter, and why."""
    assert isinstance(exc, RequestValidationError)
    raise refuse(complaints(exc.errors(), skip=1)) from None
