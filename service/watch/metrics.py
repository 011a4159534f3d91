"""Every metric, declared once. No label takes a value that a caller can make up."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST

REGISTRY = CollectorRegistry()

REQUESTS = Counter("pericarp_requests", "Answered HTTP requests.", ["operation", "status"], registry=REGISTRY)
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
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
    registry=REGISTRY,
)
DOCUMENTS = Counter("pericarp_documents", "Scored candidates.", registry=REGISTRY)
IMAGES = Counter("pericarp_images", "Images that passed screening.", registry=REGISTRY)
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


def render() -> bytes:
    """Every metric in Prometheus's text format."""
    return generate_latest(REGISTRY)
