"""What a search engineer calls beside `ranking.py`: the served model, health; and the platform's metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.requests import PROBLEMS, require
from service.errors import NotReady
from service.watch import metrics
from tenants.access import Scope

if TYPE_CHECKING:
    from service.cosigning import Cosigning
    from service.fleet.router import Fleet
    from service.processes.sandbox import Measure
    from service.processes.wire import Detector
    from service.screening.pool import Screen
    from service.screening.readers import Readers
    from service.sequencing import Sequencing
    from tenants.database import Database


def build_router(
    *,
    fleet: Fleet,
    screen: Screen,
    readers: Readers,
    database: Database,
    sequencing: Sequencing,
    cosigning: Cosigning,
    model: str,
) -> APIRouter:
    """The routes beside those that rank. `model` is the served model's name as callers see it."""
    router = APIRouter()

    @router.get("/vllm/v1/models", include_in_schema=False)
    @router.get("/v1/models", responses={401: PROBLEMS[401]}, tags=["search"], summary="The served model")
    async def list_models(request: Request) -> dict[str, Any]:
        """OpenAI's list shape."""
        request.state.exchange.operation = "models"
        card = fleet.card
        told: dict[str, Any] = {"id": model, "object": "model", "owned_by": "pericarp"}
        if card is not None:
            told |= {
                "digest": card.digest,
                "parameters": card.parameters,
                "dtype": card.dtype,
                "attention": card.attention,
                "max_model_len": card.context_tokens,
            }
        return {"object": "list", "data": [told]}

    @router.get("/healthz", tags=["health"], summary="The process is alive")
    async def tell_health() -> dict[str, str]:
        """Says nothing of workers or the database: see /readyz."""
        return {"status": "ok"}

    @router.get(
        "/readyz", tags=["health"], summary="Requests can be answered", responses={503: PROBLEMS[503]}
    )
    async def tell_readiness() -> dict[str, Any]:
        """True only when a worker has scored a warm-up, screening runs, the database answers and the log's tree holds.

        `screening` tells what is looked with, what of it is missing, and how the processes that look are confined;
        `workers` how those are that score;
        `witnesses`, where there are any, how each stands, which no answer waits for.
        """
        checks = {
            "worker": fleet.ready,
            "screening": screen.ready and readers.ready,
            "database": await database.answers(),
            "log": not sequencing.fault,
        }
        if not all(checks.values()):
            missing = ", ".join(name for name, ready in checks.items() if not ready)
            raise NotReady(f"Not ready yet: {missing}.", reason=missing)
        weights = "unknown" if fleet.card is None else fleet.card.weights
        screening = {
            "detectors": [_tell_detector(each) for each in (*screen.detectors, *readers.detectors)],
            "sandbox": {"images": _tell_sandbox(screen.sandbox), "texts": _tell_sandbox(readers.sandbox)},
        }
        witnesses = {"witnesses": cosigning.standing} if cosigning.standing else {}
        workers = {"sandbox": _tell_sandbox(fleet.sandbox)}
        return {
            "status": "ready",
            "checks": checks,
            "weights": weights,
            "workers": workers,
            "screening": screening,
            **witnesses,
        }

    @router.get("/metrics", tags=["operations"], summary="Prometheus metrics (platform_admin keys)")
    async def export_metrics(request: Request) -> Response:
        """Counts over all tenants, so only the platform's own keys may read them."""
        request.state.exchange.operation = "metrics"
        require(request.state.exchange, "platform_admin", Scope.METRICS)
        workers = fleet.workers()
        for state in ("assigned", "spare"):
            metrics.WORKERS.labels(state).set(sum(worker.state == state for worker in workers))
        metrics.WORKER_COMPILATIONS.set(sum(worker.compilations for worker in workers))
        lent = fleet.lent
        metrics.LENT_BYTES.set(lent.size_bytes)
        metrics.LENT_WORKERS.set(lent.workers)
        metrics.LENT_CHANGES.set(lent.changes)
        metrics.JOBS.labels("running").set(sum(worker.running for worker in workers))
        metrics.JOBS.labels("waiting").set(fleet.waiting)
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)

    return router


def _tell_detector(detector: Detector) -> dict[str, Any]:
    return {
        "name": detector.name,
        "active": detector.active,
        "version": detector.version,
        "licence": detector.licence,
    }


def _tell_sandbox(measures: tuple[Measure, ...]) -> dict[str, bool]:
    """Which measures of confinement hold, as the process itself read them back."""
    return {measure.name: measure.held for measure in measures}
