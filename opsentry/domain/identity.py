"""Record the life of tenants and API tokens as events of the tenant's ledger.

Tenants and tokens are ordinary rows, not aggregates: these events have no state and no decider.
"""

from datetime import datetime
from typing import ClassVar, TypeAlias

from opsentry.domain.decider import Event

TENANT = "tenant"
TOKEN = "token"  # noqa: S105 - a stream kind, no secret


class TenantCreated(Event, frozen=True, kw_only=True):
    """The tenant's ledger was opened. The stream has the tenant's own id."""

    TYPE: ClassVar[str] = "tenant.created"
    slug: str
    name: str


class TokenCreated(Event, frozen=True, kw_only=True):
    """An API token was created. The stream has the token's id; the ledger never holds its value."""

    TYPE: ClassVar[str] = "token.created"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"name"})
    prefix: str
    name: str
    scopes: tuple[str, ...]
    expires_at: datetime | None = None


class TokenRevoked(Event, frozen=True, kw_only=True):
    """An API token was revoked."""

    TYPE: ClassVar[str] = "token.revoked"


IdentityEvent: TypeAlias = TenantCreated | TokenCreated | TokenRevoked
