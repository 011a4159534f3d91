"""What one installation keeps on its host: its secrets, and its database where that is the embedded one.

Everything lies under `PERICARP_HOME`, which only its owner may enter. The secrets never go into the database,
an argument list, an environment or a log.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tenants import embedded
from tenants.database import migrate
from tenants.provisioning import provision

if TYPE_CHECKING:
    from service.settings import Settings

SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Installation:
    """Where the database is, and the three keys that are kept apart from it."""

    app_url: str = field(repr=False)
    owner_url: str | None = field(repr=False)
    pepper: bytes = field(repr=False)
    """HMAC key of every API key's secret, 32 bytes."""
    master_key: bytes = field(repr=False)
    """Wraps the tenants' audit keys, 32 bytes."""
    log_key: bytes = field(repr=False)
    """Signs the log's checkpoints: an Ed25519 private key (RFC 8032), 32 bytes."""
    backup_url: str | None = field(default=None, repr=False)
    """The server as a role that may replicate; None where nobody said how."""


@contextmanager
def opened(settings: Settings) -> Iterator[Installation]:
    """The installation under `settings.home`, its embedded Postgres running for as long as the block lasts.

    Blocking; call it outside of any event loop. A second process may open the same installation: it shares the
    running Postgres.
    """
    home = settings.home.resolve()
    # As root, Postgres runs as somebody who must get through to the data, if not see what lies beside it.
    home.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    keep = home / "secrets"
    keep.mkdir(mode=0o700, exist_ok=True)
    keys = (keep_secret(keep / "pepper"), keep_secret(keep / "master-key"), keep_secret(keep / "log-key"))
    if settings.database_url is not None:
        owner_url = settings.owner_database_url.get_secret_value() if settings.owner_database_url else None
        backup_url = settings.backup_database_url.get_secret_value() if settings.backup_database_url else None
        yield Installation(settings.database_url.get_secret_value(), owner_url, *keys, backup_url)
        return
    with embedded.running(home) as server:
        urls = asyncio.run(
            provision(
                server.superuser_url,
                owner_password=keep_secret(keep / "postgres-owner").hex(),
                app_password=keep_secret(keep / "postgres-app").hex(),
            )
        )
        yield Installation(urls.app_url, urls.owner_url, *keys, server.superuser_url)


def bring_up_to_date(installation: Installation) -> None:
    """Migrate the database to this version's schema, where this installation owns it."""
    if installation.owner_url is not None:
        asyncio.run(migrate(installation.owner_url))


def keep_secret(path: Path) -> bytes:
    """Read 32 random bytes from `path`, or make them: complete or not at all, readable by the owner alone.

    Raises `RuntimeError` for a file of another length.
    """
    if not path.exists():
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)  # unlike rename, never replaces what another process made meanwhile
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise RuntimeError(
            f"{path} should hold {SECRET_BYTES} bytes and holds {len(secret)}; restore it from a backup"
        )
    return secret
