"""What can go wrong in `tenants`. A docstring's first line is the default message, fit for a caller's eyes.

    TenancyError
    ├── Unauthenticated         who calls is not known
    │   ├── KeyMalformed        not a key of ours, or one with a typo; no database was asked
    │   ├── KeyUnknown          unknown, revoked, expired, or the wrong secret: one message for all
    │   ├── TokenInvalid        a token that is not well formed, not signed by its issuer, or over
    │   └── CertificateInvalid  a client certificate that does not hold, or says who it is in two ways
    ├── Forbidden               who calls is known and may not
    │   └── TenantSuspended
    ├── TenantNotFound · TenantExists · KeyNotFound
    ├── SessionNotFound         unknown, closed, expired, another tenant's, or no id at all: one message for all
    ├── ReviewNotFound          no item that could be judged
    ├── ReviewRefused           an item that nobody drew or appealed, or that is decided otherwise
    ├── ThresholdNotFound       nothing learnt there, or no such version
    ├── RepeatDiffers           one idempotency key for two requests
    ├── RepeatUnderWay          the same request twice at the same time
    ├── InvalidName             a tenant's or key's name that we do not take
    ├── Invalid                 what a caller wrote, with each fault
    │   ├── InvalidPolicy       a policy that contradicts itself, or has unknown fields
    │   ├── InvalidKeyLimits    a key's limits that are none, or above its tenant's
    │   └── InvalidKeyRights    scopes or addresses that a key cannot have, or that its creator lacks
    ├── RotationRefused         two secrets are live already, or the key is over
    ├── PolicyChanged           a policy or ceiling that is not the one that the caller has seen
    ├── QuotaExceeded           a limit is used up; come back after `retry_after_s`
    ├── RequestTooCostly        costs more than the limit lets through at once: waiting does not help
    ├── InvalidIdentities       the file of issuers and certificates is wrong
    ├── KeySetInvalid           an issuer's keys cannot be used
    ├── KeySetMissing           an issuer's keys are not there: retryable
    ├── EntryInvalid            the bytes are not an entry of the log
    ├── EntryNotFound           no entry of that id, or another tenant's: one message for both
    ├── SearchNotFound · SearchExists
    ├── SilenceNotFound         no such silence of alerts, or it is over
    ├── ProofInvalid            a proof, checkpoint or signature of the log that does not hold
    │   └── LogBroken           the stored tree is not the one that was signed
    ├── ReceiptNotFound         no entry of that id, or another tenant's: one message for both
    ├── ReceiptPending          the entry is not in the tree yet: retryable
    ├── SealBroken              a wrapped secret does not open: wrong master key, or altered bytes
    ├── DatabaseUnavailable     retryable; nothing is known to have happened
    ├── UnsafeRole              the runtime role could step over row security; the service must not start
    └── SchemaOutdated          the schema is not the one this version needs

Driver errors never leave `tenants`: `database.py` translates them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

    from tenants.limits import Standing


class TenancyError(Exception):
    """Something is wrong with a tenant, a key, a limit or the database."""

    def __init__(self, message: str | None = None) -> None:
        """`message` is for operators; what a caller reads is the docstring's first line."""
        super().__init__(message or (type(self).__doc__ or "").split("\n")[0])


class Unauthenticated(TenancyError):
    """The API key is missing or not valid.

    `tenant` and `key_id` are set where a *known* key failed, for the log alone; a caller must never learn
    them. `reason` is a word for the log: malformed, unknown, wrong_secret, plane, revoked, expired, rotated (the
    secret, not the key), address; of a token or certificate also conflict, denied, no_tenant and its own.
    """

    def __init__(self, *, reason: str, tenant: UUID | None = None, key_id: str | None = None) -> None:
        super().__init__()
        self.reason = reason
        self.tenant = tenant
        self.key_id = key_id


class KeyMalformed(Unauthenticated):
    """The API key is missing or not valid."""

    def __init__(self) -> None:
        super().__init__(reason="malformed")


class KeyUnknown(Unauthenticated):
    """The API key is missing or not valid."""


class TokenInvalid(Unauthenticated):
    """The token is missing or not valid."""


class CertificateInvalid(Unauthenticated):
    """The client certificate is missing or not valid."""


class Forbidden(TenancyError):
    """This key may not do that."""


class TenantSuspended(Forbidden):
    """This key's tenant is suspended."""

    def __init__(self, *, tenant: UUID, key_id: str) -> None:
        super().__init__()
        self.tenant = tenant
        self.key_id = key_id


class TenantNotFound(TenancyError):
    """There is no such tenant."""


class TenantExists(TenancyError):
    """There is a tenant of that name already."""


class KeyNotFound(TenancyError):
    """There is no such key."""


class SessionNotFound(TenancyError):
    """There is no such open session."""


class ReviewNotFound(TenancyError):
    """There is no such item to be judged."""


class ReviewRefused(TenancyError):
    """This item was neither drawn nor appealed, or it is decided otherwise."""


class ThresholdNotFound(TenancyError):
    """Nothing was learnt there, or there is no such version."""


class RepeatDiffers(TenancyError):
    """This idempotency key was used for another request."""


class RepeatUnderWay(TenancyError):
    """The first request with this idempotency key is not answered yet."""


class InvalidName(TenancyError):
    """The name is not valid."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a value that a caller wrote, in words that the caller may read."""

    field: str
    """Empty: the value as a whole."""
    why: str

    def __str__(self) -> str:
        return f"{self.field}: {self.why}" if self.field else self.why


class PolicyChanged(TenancyError):
    """Somebody else has changed the policy meanwhile; read it again."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version = version
        """The one in force."""


class Invalid(TenancyError):
    """What was sent is not valid.

    `faults` tells each thing that is wrong, and all of them.
    """

    def __init__(self, faults: tuple[Fault, ...] | str) -> None:
        self.faults = (Fault("", faults),) if isinstance(faults, str) else faults
        super().__init__("; ".join(map(str, self.faults)))


class InvalidPolicy(Invalid):
    """The policy is not valid."""


class InvalidKeyLimits(Invalid):
    """The key's limits are not valid."""


class InvalidKeyRights(Invalid):
    """The key's scopes or addresses are not valid."""


class RotationRefused(TenancyError):
    """The key cannot be rotated now."""


class QuotaExceeded(TenancyError):
    """A limit of the tenant is used up.

    `violated` names the limits (of `tenants.limits`, or `sessions` alone); all of them let the same request through
    `retry_after_s` from now if nothing else is asked meanwhile and what runs has ended. `standings` tells every
    limit's state.
    """

    def __init__(
        self, *, violated: tuple[str, ...], retry_after_s: int, standings: tuple[Standing, ...] = ()
    ) -> None:
        super().__init__(f"Used up: {', '.join(violated)}. Try again in {retry_after_s} s.")
        self.violated = violated
        self.retry_after_s = retry_after_s
        self.standings = standings


class RequestTooCostly(TenancyError):
    """The request costs more than the tenant's limit ever lets through at once."""

    def __init__(self, *, limit: str, cost: int, at_once: int) -> None:
        super().__init__(f"{cost} {limit} are more than the {at_once} that fit at once.")
        self.limit = limit
        self.cost = cost
        self.at_once = at_once


class InvalidIdentities(TenancyError):
    """The file of issuers and certificates is not valid."""


class KeySetInvalid(TenancyError):
    """The identity provider's keys cannot be used."""


class KeySetMissing(TenancyError):
    """The identity provider's keys are not there yet. Try again shortly."""


class EntryInvalid(TenancyError):
    """These bytes are not an entry of the log."""


class EntryNotFound(TenancyError):
    """There is no such entry."""


class SearchNotFound(TenancyError):
    """There is no saved search of that name."""


class SearchExists(TenancyError):
    """There is a saved search of that name already."""


class SilenceNotFound(TenancyError):
    """There is no such silence, or it is over."""


class ProofInvalid(TenancyError):
    """The proof does not hold."""


class LogBroken(ProofInvalid):
    """The log's tree does not agree with what was signed; its operators are told. Nothing is proven until it does."""


class ReceiptNotFound(TenancyError):
    """There is no such receipt."""


class ReceiptPending(TenancyError):
    """The entry is recorded, and not in the tree yet. Try again shortly."""


class SealBroken(TenancyError):
    """A stored secret cannot be opened."""


class DatabaseUnavailable(TenancyError):
    """The database does not answer. Try again shortly."""


class UnsafeRole(TenancyError):
    """The database role could see other tenants' rows."""


class SchemaOutdated(TenancyError):
    """The database schema does not belong to this version; run `migrate`."""
