"""One frozen object with every setting, read from `PERICARP_*` once and validated once.

Defaults stand here and nowhere else. `tenants` and `models` never see this object: they receive plain values.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import DirectoryPath, Field, FilePath, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models import DEMO
from service.known_witnesses import read_witnesses


class Settings(BaseSettings):
    """Settings of one installation. Field descriptions are the README's table of settings."""

    model_config = SettingsConfigDict(env_prefix="PERICARP_", frozen=True, extra="forbid")

    home: Path = Field(Path("var"), description="Folder of all state: database, secrets, logs.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    database_url: SecretStr | None = Field(
        None,
        description="Postgres of your own, as the runtime role (`postgresql://pericarp_app:…@host/pericarp`). "
        "Unset: the embedded Postgres under `PERICARP_HOME`.",
    )
    owner_database_url: SecretStr | None = Field(
        None,
        description="The same database as its owner; only `migrate` uses it. Needed with `PERICARP_DATABASE_URL`.",
    )
    model: str = Field(
        DEMO,
        min_length=1,
        description="`pericarp-demo`, a Qwen2.5-VL checkpoint folder, or a hub name such as `vec-ai/lychee-rerank-mm`.",
    )
    model_aliases: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Other names of the model on the dialects' paths, separated by commas, for clients that send their "
        "vendor's: `rerank-v3.5,jina-reranker-m0,rerank-2.5`.",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="`auto`, `cpu`, `cuda` or `cuda:N`."
    )
    dtype: str = Field(
        "auto",
        pattern=r"^(auto|bf16|fp32)$",
        description="`auto`, `bf16` or `fp32`; auto is bf16 on a GPU and on a CPU with instructions for it, else fp32.",
    )
    worker_threads: int = Field(
        default_factory=lambda: max(
            1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ),
        ge=1,
        description="Threads of one worker on a CPU, each on work of its own. Default: the cores of this machine.",
    )
    max_workers: int = Field(
        8, ge=1, description="Worker processes at most; beyond it the least recently used one retires."
    )
    spare_workers: int = Field(
        1,
        ge=0,
        le=4,
        description="Loaded workers that wait for a tenant, so that a first request need not load the model.",
    )
    worker_idle_s: float = Field(
        900.0, gt=0, description="A tenant's worker retires after so many idle seconds."
    )
    worker_start_s: float = Field(120.0, gt=0, description="Seconds a worker may take to load its model.")
    share_weights: bool = Field(
        True, description="Workers share one copy of the weights; `false` gives each a copy of its own."
    )
    weights_check_s: float = Field(
        60.0, gt=0, description="Seconds between two checks of weights that are shared on a GPU."
    )
    queue_limit: int = Field(64, ge=1, description="Requests that may wait for one worker; beyond it 503.")
    deadline_s: float = Field(60.0, gt=0, description="Seconds a request may take; then 504.")
    screeners: int = Field(2, ge=1, le=64, description="Screening processes that decode images.")
    screening_s: float = Field(
        10.0, gt=0, description="Seconds one image may take to decode; then it is refused."
    )
    image_nets: bool = Field(
        True,
        description="Screening processes load the two networks for nudity and gore (210 MB each); `false`: where"
        " a policy asks for them, they count as failed.",
    )
    image_text: bool = Field(
        True,
        description="Screening processes load the two networks that read text in images (30 MB each, more while they read);"
        " `false`: where a policy asks for them, they count as failed.",
    )
    image_heads: DirectoryPath | None = Field(
        None,
        description="Folder of linear classifiers of your own (`*.safetensors`) over open_nsfw's features.",
    )
    image_plugins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Image detectors of other packages, by the names of their entry points, separated by commas.",
    )
    body_limit_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="Largest request body.")
    image_limit_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="Largest encoded image.")
    image_limit_pixels: int = Field(
        40_000_000, ge=784, description="Most pixels (width × height) of an image."
    )
    image_limit_side: int = Field(16_384, ge=28, description="Longest side of an image, in pixels.")
    image_limit_aspect: int = Field(200, ge=1, le=200, description="Longest side over shortest side at most.")
    image_limit_frames: int = Field(1, ge=1, description="Frames at most; 1 refuses animations.")
    remote_image_ca: FilePath | None = Field(
        None,
        description="PEM file of the CAs that sign for the hosts of remote images; unset: those that the system trusts.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Reverse proxies, as networks with commas between (`10.0.0.0/8,fd00::/8`): from them alone"
        " `X-Forwarded-For` is read.",
    )
    identities: FilePath | None = Field(
        None,
        description="TOML file of token issuers and client certificates, and whom they speak for; unset: keys alone.",
    )
    tls_certificate: FilePath | None = Field(
        None, description="PEM file of the server's certificate and its chain; set, TLS ends here."
    )
    tls_key: FilePath | None = Field(None, description="PEM file of its private key.")
    client_ca: FilePath | None = Field(
        None, description="PEM file of the CA that signs client certificates; unset: none is asked for."
    )
    client_cert_header: bool = Field(
        False,
        description="Believe `Client-Cert` (RFC 9440) from the trusted proxies, which must strip it from what comes in.",
    )
    witnesses: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Witnesses of the log, `URL=VKEY` with commas between: each cosigns the newest checkpoint every few seconds.",
    )
    log_level: str = Field(
        "info", pattern=r"^(debug|info|warning|error)$", description="Least severe log line that is written."
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of their own for `/metrics`, which then ask for no key there; unset: on the service's port, with one.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address to listen on for it.")
    metrics_tenants: int = Field(
        20, ge=0, le=200, description="Tenants that metrics tell apart, those with the most requests."
    )

    # Whose models are served: service/custody.py
    model_key: FilePath | None = Field(
        None,
        description="PEM file of the public key that the model must be signed with; unset: a model needs no signature.",
    )
    model_signature: Path | None = Field(
        None, description="File of the model's signed manifest; unset: `model.sig` in the model's folder."
    )
    model_seal_fd: int | None = Field(
        None, ge=0, description="Descriptor that the key of a sealed model is read from, once, at the start."
    )
    model_seal_command: tuple[str, ...] = Field(
        (),
        description='Or the command that prints it, as JSON: `["kms", "decrypt", "…"]`. It is run without a shell.',
    )
    log_folder: Path | None = Field(
        None, description="Folder for log lines, a file a day in UTC; unset: they go to stderr."
    )
    log_file_bytes: int = Field(
        256 * 1024 * 1024, ge=4096, description="Size from which on the day's log goes on in another file."
    )
    log_retention_days: int = Field(
        14, ge=1, description="Days of log files that are kept, today's included; older ones are deleted."
    )

    alerts: FilePath | None = Field(
        None,
        description="TOML file of alert rules and sinks (`docs/alerts.md`); unset: the shipped rules, told in the log.",
    )
    anomaly_key_per_minute: int = Field(
        100,
        ge=1,
        description="Requests a minute from which on a key, or a client of it, may be a `rate_anomaly`.",
    )
    anomaly_stranger_per_minute: int = Field(
        10,
        ge=1,
        description="Refused requests a minute from which on an address may be one whose caller nobody knows.",
    )
    anomaly_allowed: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Networks whose addresses never count as anomalies, with commas between."
    )
    anomaly_clients: int = Field(
        10_000,
        ge=100,
        le=1_000_000,
        description="Keys, clients and addresses that are remembered, of each so many at most.",
    )

    worker_memory_bytes: int = Field(
        4 * 1024**3,
        ge=64 * 1024 * 1024,
        description="Memory that a worker on a CPU may take beside what it has loaded; a request beyond it gets 503.",
    )
    tenant_requests: int = Field(
        256, ge=1, description="Requests of one tenant that may be under way at this gateway; beyond it 503."
    )
    tenant_body_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        description="Bytes of their bodies together, as they are sent; beyond it 503.",
    )
    plaintext: bool = Field(
        False,
        description="Listen without TLS on an address that is not this host's alone, and where no trusted proxy is"
        " named; else the start is refused.",
    )

    backup_store: str | None = Field(
        None,
        description="Where backups go: the absolute path of a folder, or `s3://bucket/prefix`; unset: nowhere.",
    )
    backup_key_command: tuple[str, ...] = Field(
        (),
        description='Command that prints the key of backups, as JSON: `["kms", "decrypt", "…"]`. Unset: `secrets/backup-key`.',
    )
    backup_key_fd: int | None = Field(
        None, ge=0, description="Descriptor that a backup command reads the key of backups from, instead."
    )
    backup_database_url: SecretStr | None = Field(
        None,
        description="A Postgres of your own as a role that may replicate; only `backup` uses it.",
    )
    backup_increments: int = Field(
        23, ge=0, le=1000, description="Incremental backups between two full ones; 0: every one is full."
    )
    backup_keep: int = Field(
        14, ge=1, description="Full backups that `backup prune` keeps, with the incremental ones upon them."
    )
    backup_timeout_s: float = Field(
        60.0, gt=0, description="Seconds for one request to an S3 store of backups, and for repeating it."
    )

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("trusted_proxies", "anomaly_allowed")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text)
        return value

    @field_validator("witnesses")
    @classmethod
    def _are_witnesses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        read_witnesses(value)
        return value

    @property
    def listens_inside(self) -> bool:
        """Whether only processes of this host can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name: wherever it leads

    def tell(self) -> dict[str, Any]:
        """Every setting as JSON has it, a secret as ***; of a command that prints a key its first word: others may open it."""
        told = self.model_dump(mode="json")
        for name in ("model_seal_command", "backup_key_command"):
            told[name] = told[name][:1]
        return told

    @property
    def model_is_local(self) -> bool:
        """Whether the model is a folder here, or the embedded one: then nothing may be downloaded."""
        return self.model == DEMO or Path(self.model).is_dir()

    @property
    def model_name(self) -> str:
        """The model's name as callers see it: of a folder its last part, for no answer holds a path."""
        return Path(self.model).resolve().name if self.model != DEMO and self.model_is_local else self.model

    @field_validator("model_aliases", "image_plugins", "witnesses", "anomaly_allowed", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())

    @model_validator(mode="after")
    def _what_identifies_is_whole(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("PERICARP_TLS_CERTIFICATE and PERICARP_TLS_KEY need each other")
        if self.client_cert_header and not (self.trusted_proxies and self.client_ca):
            raise ValueError(
                "PERICARP_CLIENT_CERT_HEADER needs PERICARP_TRUSTED_PROXIES and PERICARP_CLIENT_CA"
            )
        if self.client_ca is not None and not (self.tls_certificate or self.client_cert_header):
            raise ValueError(
                "PERICARP_CLIENT_CA needs PERICARP_TLS_CERTIFICATE, or PERICARP_CLIENT_CERT_HEADER behind a proxy"
            )
        return self

    @model_validator(mode="after")
    def _what_a_model_is_trusted_by_is_whole(self) -> Settings:
        if self.model_seal_fd is not None and self.model_seal_command:
            raise ValueError("PERICARP_MODEL_SEAL_FD and PERICARP_MODEL_SEAL_COMMAND exclude each other")
        if self.model_key is None and (
            self.model_signature or self.model_seal_fd is not None or self.model_seal_command
        ):
            raise ValueError("PERICARP_MODEL_SIGNATURE and PERICARP_MODEL_SEAL_… need PERICARP_MODEL_KEY")
        return self

    @model_validator(mode="after")
    def _keys_cross_no_network_in_the_clear(self) -> Settings:
        if not (self.listens_inside or self.tls_certificate or self.trusted_proxies or self.plaintext):
            raise ValueError(
                f"PERICARP_HOST is {self.host}, where other hosts may connect, and keys would cross the network in the clear:"
                " set PERICARP_TLS_CERTIFICATE, or PERICARP_TRUSTED_PROXIES behind a proxy, or PERICARP_PLAINTEXT=true"
            )
        if self.tenant_body_bytes < self.body_limit_bytes:
            raise ValueError("PERICARP_TENANT_BODY_BYTES must be PERICARP_BODY_LIMIT_BYTES at the least")
        return self

    @model_validator(mode="after")
    def _own_database_needs_both_urls_to_migrate(self) -> Settings:
        if self.owner_database_url is not None and self.database_url is None:
            raise ValueError("PERICARP_OWNER_DATABASE_URL is set but PERICARP_DATABASE_URL is not")
        return self
