"""Backups that restore: an installation's configuration, its model's files, and its database with the log.

    key.py            the one secret of backups: what seals them, and what signs their manifests
    store.py          a folder or an S3 bucket: objects that are created once and never overwritten
    parts.py          a stream of any length as sealed objects of 32 MiB, and back
    manifest.py       what a backup is, signed; sequence numbers and parents, never names or clocks, order them
    shelf.py          the backups of one installation in a store, in their order, each checked against its place
    archive.py        tar in and out: what Postgres and we write of it, and nothing else
    making.py         run: full, or what changed since the last one
    configuration.py  settings without secrets, policies, and which secrets a restore needs
    model_files.py    the model's files by digest, each stored once
    fetching.py       the parts of a backup and of those that it stands upon, unpacked; goes on where it was cut off
    verifying.py      verify: restore into a scratch Postgres, read everything, compare the log with what is known of it
    restoring.py      restore: into an empty home
    drilling.py       drill: a timed cold recovery until `/v1/rerank` answers
    pruning.py        prune: what retention no longer keeps, never what a kept backup stands upon

Everything is sealed before it leaves this host (`cobblestone`), and bound to its installation, backup, sequence number and
part. What opens or forges a log is in none: the master key, the pepper and the log's key are kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager


class BackupError(Exception):
    """A backup could not be made, or is not to be trusted."""


class StoreFailed(BackupError):
    """The store of backups does not answer, or refuses."""


class BackupDamaged(BackupError):
    """What the store has is not what was put there, or not all of it."""


class BackupDoubted(BackupError):
    """A backup is not what it should be: too old, of another log, or it does not restore."""


class BackupRefused(BackupError):
    """This cannot be done here, and nothing was changed."""


Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Shows a stage of so many steps (None: how many is not known) while its block lasts; what it gives is told each advance."""
