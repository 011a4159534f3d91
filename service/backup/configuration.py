"""What a backup says of an installation besides its database: settings, files that they name, policies for people to read.

No secret is in it. Of each secret that a restored installation needs there is a check value instead, HMAC-SHA-256 under
that secret, so that a restore can say which one is missing or another installation's before anything is served.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import SecretStr

from service.backup import BackupDamaged, BackupRefused
from service.backup.archive import pack, unpack

if TYPE_CHECKING:
    from service.settings import Settings
    from tenants.directory import Directory

SECRETS = ("pepper", "master-key", "log-key")
"""Files of the secrets' folder that a restore needs and no backup has."""
FILES = ("identities", "remote_image_ca", "tls_certificate", "client_ca", "image_heads")
"""Settings that name files which are no secrets. `tls_key` names one."""
CHECK = b"pericarp backup secret check"


@dataclass(frozen=True, slots=True)
class Configuration:
    """As it is in a backup."""

    settings: Mapping[str, Any]
    """Without those that hold a secret."""
    checks: Mapping[str, str]
    """By the name of a secret's file, what tells it from another, in hex."""
    files: Mapping[str, bytes] = field(repr=False)
    """By setting and name."""
    policies: Any
    """Tenants with their policies, as they were."""
    database: str
    """Its name on its server."""

    def pack(self) -> bytes:
        told = {
            "settings": self.settings,
            "secrets": self.checks,
            "policies": self.policies,
            "database": self.database,
        }
        return pack(
            {f"{name}.json": orjson.dumps(value, option=orjson.OPT_INDENT_2) for name, value in told.items()}
            | {f"files/{name}": content for name, content in self.files.items()}
        )

    @classmethod
    def unpack(cls, data: bytes) -> Configuration:
        """Raises `BackupDamaged`."""
        found = unpack(data)
        try:
            settings, checks, policies, database = (
                orjson.loads(found.pop(f"{name}.json"))
                for name in ("settings", "secrets", "policies", "database")
            )
        except (KeyError, ValueError) as exc:
            raise BackupDamaged("the configuration cannot be read") from exc
        if sorted(checks) != sorted(SECRETS):
            raise BackupDamaged("the configuration names other secrets than ours")
        return cls(
            settings,
            checks,
            {name.removeprefix("files/"): content for name, content in found.items()},
            policies,
            database,
        )

    def refuse_other_secrets(self, folder: Path) -> None:
        """Raises `BackupRefused` unless the secrets in `folder` are those that the backup's installation had."""
        for name, check in self.checks.items():
            path = folder / name
            if not path.is_file():
                raise BackupRefused(f"{path} is not there: put it there from where secrets are kept")
            if not hmac.compare_digest(check_value(path.read_bytes()), check):
                raise BackupRefused(
                    f"{path} is another installation's, or of another time: find the right one"
                )


def check_value(secret: bytes) -> str:
    """What tells a secret from another, and does not give it away: it has 256 random bits."""
    return hmac.digest(secret, CHECK, hashlib.sha256).hex()


async def collect(settings: Settings, home: Path, directory: Directory, database: str) -> Configuration:
    """Of an installation that is open. Raises `BackupRefused` where a file cannot be read."""
    plain = {
        name: value
        for name, value in settings.tell().items()
        if not isinstance(getattr(settings, name), SecretStr)
    }
    files: dict[str, bytes] = {}
    for name in FILES:
        path: Path | None = getattr(settings, name)
        if path is not None:
            files.update({f"{name}/{each.name}": _read(each) for each in _files(path)})
    checks = {name: check_value(_read(home / "secrets" / name)) for name in SECRETS}
    policies = []
    for tenant in await directory.list_tenants():
        policy = await directory.find_policy(tenant.id)
        policies.append({"id": str(tenant.id), "name": tenant.name, "policy": orjson.loads(policy.to_json())})
    return Configuration(plain, checks, files, policies, database)


def _files(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise BackupRefused(f"{path} cannot be read: {exc.strerror}") from exc
