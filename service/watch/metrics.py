"""Every metric, declared once. No label takes a value that a caller can make up; of tenants, few have one.

What happens is counted by whoever sees it happen; what merely is (workers, queues, sizes) is told by
`service/exposition.py` when somebody asks.
"""

from __future__ import annotations

import time
from itertools import product
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from service import __version__
from service.errors import TABLE
from service.watch.tenants import TopTenants

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTENT_TYPE = CONTENT_TYPE_LATEST
DEFAULT_TENANTS = 20
"""Tenants with a label of their own, where nothing else was said."""

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, of no use to Prometheus
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

BUILD = Gauge("pericarp_build_info", "Always 1; the version is in its label.", ["version"], registry=REGISTRY)
BUILD.labels(__version__).set(1)
READY = Gauge(
    "pericarp_ready",
    "Whether that part is ready, 1 or 0. Says nothing of the database, which no scrape asks.",
    ["part"],
    registry=REGISTRY,
)
REQUESTS = Counter("pericarp_requests", "Answered HTTP requests.", ["operation", "status"], registry=REGISTRY)
REFUSALS = Counter(
    "pericarp_refusals",
    "Requests of known callers that ended with an error, by the code of its answer.",
    ["code"],
    registry=REGISTRY,
)
IMAGE_REFUSALS = Counter(
    "pericarp_image_refusals",
    "Requests that were refused for an image, by what was wrong with it.",
    ["reason"],
    registry=REGISTRY,
)
UNAUTHENTICATED = Counter(
    "pericarp_unauthenticated", "Requests refused before a caller was known.", ["code"], registry=REGISTRY
)
KEY_REFUSALS = Counter(
    "pericarp_key_refusals", "Refusals of keys that are known.", ["reason"], registry=REGISTRY
)
LIMITS = Counter(
    "pericarp_limits",
    "Requests that a limit refused, or would have refused were it not in shadow.",
    ["limit", "outcome"],
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "pericarp_stage_seconds",
    "Time a rerank request spent in one stage.",
    ["stage"],
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
    registry=REGISTRY,
)
DOCUMENTS = Counter("pericarp_documents", "Scored candidates.", registry=REGISTRY)
IMAGES = Counter("pericarp_images", "Images that passed screening.", registry=REGISTRY)
INPUT_TOKENS = Counter(
    "pericarp_input_tokens",
    "Tokens of answered reranks, as they are charged: the whole prompt once for each candidate.",
    registry=REGISTRY,
)
IMAGE_TOKENS = Counter(
    "pericarp_image_tokens", "Those of the charged tokens that stand for images.", registry=REGISTRY
)
COMPUTED_TOKENS = Counter(
    "pericarp_computed_tokens",
    "Tokens that the model computed for answered reranks: what is shared once, what is kept not at all.",
    registry=REGISTRY,
)
TENANT_REQUESTS = Counter(
    "pericarp_tenant_requests",
    "Requests of search keys, by tenant and by how they ended.",
    ["tenant", "outcome"],
    registry=REGISTRY,
)
TENANT_SECONDS = Histogram(
    "pericarp_tenant_seconds",
    "Time from a search key's request to its answer.",
    ["tenant"],
    buckets=(0.1, 0.5, 1, 2.5, 10),
    registry=REGISTRY,
)
TENANT_TOKENS = Counter(
    "pericarp_tenant_input_tokens", "Charged tokens of a tenant's reranks.", ["tenant"], registry=REGISTRY
)
TENANT_IMAGES = Counter(
    "pericarp_tenant_images",
    "Images of a tenant's requests that were answered.",
    ["tenant"],
    registry=REGISTRY,
)
RISKS = Counter(
    "pericarp_risks",
    "Risks that reached a threshold, by what was done about them.",
    ["category", "action"],
    registry=REGISTRY,
)
DETECTOR_FAILURES = Counter(
    "pericarp_detector_failures",
    "Texts and images that a detector should have looked at and could not.",
    ["detector"],
    registry=REGISTRY,
)
WORKERS = Gauge("pericarp_workers", "Live worker processes.", ["state"], registry=REGISTRY)
WORKER_COMPILATIONS = Gauge(
    "pericarp_worker_compilations",
    "Kernels that live workers compiled after their warm-up.",
    registry=REGISTRY,
)
LENT_BYTES = Gauge("pericarp_lent_bytes", "Weights that workers share on a GPU.", registry=REGISTRY)
LENT_WORKERS = Gauge("pericarp_lent_workers", "Workers that map shared weights on a GPU.", registry=REGISTRY)
LENT_CHANGES = Gauge(
    "pericarp_lent_changes",
    "Times that shared weights were found changed since the start.",
    registry=REGISTRY,
)
JOBS = Gauge("pericarp_jobs", "Jobs at workers, and in line before them.", ["state"], registry=REGISTRY)
OLDEST_WAIT = Gauge(
    "pericarp_oldest_wait_seconds",
    "For how long the job in line that waits longest has waited.",
    registry=REGISTRY,
)
WORKER_STARTS = Counter(
    "pericarp_worker_starts", "Starts of workers that ended, by how.", ["outcome"], registry=REGISTRY
)
WORKER_ENDS = Counter("pericarp_worker_ends", "Workers that ended, by why.", ["reason"], registry=REGISTRY)
PACKS = Counter("pericarp_packs", "Forward passes of workers.", registry=REGISTRY)
PACKED_TOKENS = Counter("pericarp_packed_tokens", "Tokens in these passes.", registry=REGISTRY)
PACK_ROOM_TOKENS = Counter(
    "pericarp_pack_room_tokens", "Tokens that there was room for in these passes.", registry=REGISTRY
)
CACHE = Counter(
    "pericarp_cache",
    "Things that were looked for in what is kept, by whether they were there.",
    ["cache", "outcome"],
    registry=REGISTRY,
)
SCREENING_LOSSES = Counter(
    "pericarp_screening_losses",
    "Children that screen and died or were killed, by what they look at and why.",
    ["looks_at", "reason"],
    registry=REGISTRY,
)
WORKER_RETRIES = Counter(
    "pericarp_worker_retries", "Requests scored again after a worker died.", registry=REGISTRY
)
LOG_SIZE = Gauge(
    "pericarp_log_size", "Entries in the log's tree, as this gateway saw it last.", registry=REGISTRY
)
LOG_LAG = Gauge(
    "pericarp_log_lag_seconds",
    "How long the first entry that is not in the tree has waited.",
    registry=REGISTRY,
)
LOG_WAITING = Gauge(
    "pericarp_log_waiting",
    "Entries that were waiting to be put into the tree, as this gateway saw it last.",
    registry=REGISTRY,
)
LOG_FAILURES = Counter(
    "pericarp_log_failures",
    "Times that entries could not be put into the tree.",
    ["reason"],
    registry=REGISTRY,
)
COSIGNED_SIZE = Gauge(
    "pericarp_log_cosigned_size",
    "Entries in the newest tree that a witness has cosigned, as this gateway knows.",
    ["witness"],
    registry=REGISTRY,
)
COSIGNING_FAILURES = Counter(
    "pericarp_log_cosigning_failures",
    "Times that a witness did not cosign.",
    ["reason"],
    registry=REGISTRY,
)

ANOMALIES = Counter("pericarp_anomalies", "What was out of the ordinary.", ["anomaly"], registry=REGISTRY)
OBSERVATION_FAILURES = Counter(
    "pericarp_observation_failures",
    "Requests that could not be looked at for anomalies; they were answered all the same.",
    registry=REGISTRY,
)
BACKUP_TIME = Gauge(
    "pericarp_backup_timestamp_seconds",
    "When the newest good one ended, in Unix time; 0 where none is known.",
    ["step"],
    registry=REGISTRY,
)
ALERTS = Counter(
    "pericarp_alerts",
    "Notifications of alerts, by sink and by what became of them.",
    ["sink", "outcome"],
    registry=REGISTRY,
)
ALERTS_SUPPRESSED = Counter(
    "pericarp_alerts_suppressed", "Alerts that nobody was told of, by why.", ["reason"], registry=REGISTRY
)
ALERTS_FIRING = Gauge("pericarp_alerts_firing", "Alerts that fire.", ["severity"], registry=REGISTRY)
DROPPED_LOG_LINES = Counter(
    "pericarp_dropped_log_lines",
    "Lines of the service's own log that its writer could not keep up with, or could not write.",
    registry=REGISTRY,
)

BACKUP_STEPS = ("run", "verify", "drill")
CLOSED: tuple[tuple[Counter | Gauge, tuple[tuple[str, ...], ...]], ...] = (
    (BACKUP_TIME, (BACKUP_STEPS,)),
    (REFUSALS, (tuple(sorted({meaning.code for meaning in TABLE.values()} | {"internal"})),)),
    (UNAUTHENTICATED, (("unauthenticated", "not_ready", "database_unavailable", "issuer_unavailable"),)),
    (KEY_REFUSALS, (("wrong_secret", "leaked", "reported"),)),
    (WORKER_STARTS, (("ready", "failed"),)),
    (
        WORKER_ENDS,
        (("idle", "seat", "weights", "died", "silent", "protocol", "overdue", "contained"),),
    ),
    (SCREENING_LOSSES, (("images", "texts"), ("died", "silent", "protocol", "overdue", "decoder"))),
    (CACHE, (("prefix", "image_features", "candidate", "text_findings", "image_findings"), ("hit", "miss"))),
    (LOG_FAILURES, (("broken", "failed", "database"),)),
    (ALERTS_SUPPRESSED, (("silenced", "full"),)),
    (COSIGNING_FAILURES, (("away", "refused", "inconsistent", "failed", "database", "broken"),)),
)
"""Series that are there from the start, at 0: Prometheus sees no increase in one that begins with its first count."""
for _metric, _values in CLOSED:
    for _labels in product(*_values):
        _metric.labels(*_labels)

_BY_TENANT = (TENANT_REQUESTS, TENANT_SECONDS, TENANT_TOKENS, TENANT_IMAGES)


def _forget(tenant: str) -> None:
    for metric in _BY_TENANT:
        metric.remove_by_labels({"tenant": tenant})


TENANTS = TopTenants(DEFAULT_TENANTS, dropped=_forget)


def name_tenants(most: int) -> None:
    """Give so many tenants a label of their own; the rest, or all where it is 0, are `other`. Call once, at start."""
    TENANTS.allow(most)


def note_request(
    operation: str, status: int, elapsed_s: float, tenant: str | None = None, *, searches: bool = False
) -> None:
    """Count an answered request of any caller; by tenant, those of its search keys."""
    REQUESTS.labels(operation, str(status)).inc()
    if tenant is not None and searches:
        label = TENANTS.count(tenant)
        outcome = "answered" if status < 400 else "refused" if status < 500 else "failed"
        TENANT_REQUESTS.labels(label, outcome).inc()
        TENANT_SECONDS.labels(label).observe(elapsed_s)


def note_refusal(code: str, reason: str | None) -> None:
    """Count an error that a known caller gets; `reason` is looked at where it is about an image."""
    REFUSALS.labels(code).inc()
    if code == "image_rejected" and reason is not None:
        IMAGE_REFUSALS.labels(reason).inc()


def note_stages(stages_ms: Mapping[str, float]) -> None:
    """Observe what the stages of an answered request took."""
    for stage, elapsed_ms in stages_ms.items():
        STAGE_SECONDS.labels(stage).observe(elapsed_ms / 1000)


def note_images(tenant: str, images: int) -> None:
    """Count the images of an answered request."""
    IMAGES.inc(images)
    if images:
        TENANT_IMAGES.labels(TENANTS.label(tenant)).inc(images)


def note_tokens(tenant: str, *, charged: int, images: int, computed: int) -> None:
    """Count the tokens of an answered rerank; `images` are within the charged ones."""
    INPUT_TOKENS.inc(charged)
    IMAGE_TOKENS.inc(images)
    COMPUTED_TOKENS.inc(computed)
    TENANT_TOKENS.labels(TENANTS.label(tenant)).inc(charged)


def note_kept(cache: str, *, hits: int, misses: int) -> None:
    """Count what was looked for in a cache, and was there or was not."""
    CACHE.labels(cache, "hit").inc(hits)
    CACHE.labels(cache, "miss").inc(misses)


def note_backup(step: str, age_s: float | None) -> None:
    """Tell how long ago the newest good `run`, `verify` or `drill` ended; None where there never was one.

    Whoever reads it from the database tells it again and again, for a scrape asks no database.
    """
    if step not in BACKUP_STEPS:
        raise ValueError(f"no step of backups: {step!r}")
    BACKUP_TIME.labels(step).set(0.0 if age_s is None else time.time() - age_s)


def render() -> bytes:
    """Every metric in Prometheus's text format."""
    return generate_latest(REGISTRY)
