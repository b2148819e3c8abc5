"""Events of who may use a tenant's ledger. ApiTokens are ordinary rows; that they came and went is on the record."""

from datetime import datetime
from typing import ClassVar, TypeAlias

from opsentry.domain.decider import Event

TENANT = "tenant"
TOKEN = "token"  # noqa: S105 - a stream kind, no secret


class TenantCreated(Event, frozen=True, kw_only=True):
    """The ledger begins. Its stream has the tenant's own id."""

    TYPE: ClassVar[str] = "tenant.created"
    slug: str
    name: str


class TokenCreated(Event, frozen=True, kw_only=True):
    """An API token was made. Its stream has the token's id; the secret is nowhere."""

    TYPE: ClassVar[str] = "token.created"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"name"})
    prefix: str
    name: str
    scopes: tuple[str, ...]
    expires_at: datetime | None = None


class TokenRevoked(Event, frozen=True, kw_only=True):
    """An API token works no longer."""

    TYPE: ClassVar[str] = "token.revoked"


AccessEvent: TypeAlias = TenantCreated | TokenCreated | TokenRevoked
