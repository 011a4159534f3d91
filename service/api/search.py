"""What a search engineer calls beside `ranking.py`: the served model, and health."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from service.api.requests import PROBLEMS
from service.errors import NotReady

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
                **({"manifest": card.manifest} if card.manifest else {}),
                **({"revision": card.revision} if card.revision else {}),
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
        `model` which files are served; `workers` how those that score are confined; `witnesses`, where there are any, how
        each stands, which no answer waits for.
        """
        checks = {
            "worker": fleet.ready,
            "screening": screen.ready and readers.ready,
            "database": await database.answers(),
            "log": not sequencing.fault,
        }
        if not all(checks.values()):
            missing = ", ".join(name for name, ready in checks.items() if not ready)
            because = f" The model is refused: {fleet.refusal}." if fleet.refusal else ""
            raise NotReady(f"Not ready yet: {missing}.{because}", reason=missing)
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
            "model": _tell_model(model, fleet),
            "workers": workers,
            "screening": screening,
            **witnesses,
        }

    return router


def _tell_model(model: str, fleet: Fleet) -> dict[str, Any]:
    """`refused` says why the files are no longer what they were when the workers that live were started."""
    card = fleet.card
    told = {"id": model, "digest": None, "manifest": None, "revision": None}
    if card is not None:
        told |= {
            "digest": card.digest,
            "manifest": card.manifest or None,
            "revision": card.revision or None,
        }
    return told | ({"refused": fleet.refusal} if fleet.refusal else {})


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
