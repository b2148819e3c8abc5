"""The caller of a use case: the tenant, the actor, the actor's permissions and the request's conditions."""

from collections.abc import Collection
from typing import TypeAlias

import msgspec

from opsentry.domain import incident, maintenance, service, subscription
from opsentry.events.codec import Actor
from opsentry.events.store import IdempotencyKey
from opsentry.identity.scopes import SCOPES, Scope

Permission: TypeAlias = Scope
"""Permissions are the scopes of API tokens; callers of our own have all of them."""

ALL_PERMISSIONS: frozenset[str] = frozenset(SCOPES)

# The permission that a change of each stream kind needs.
WRITE_PERMISSIONS: dict[str, Permission] = {
    incident.KIND: "write:incidents",
    maintenance.KIND: "write:maintenance",
    service.KIND: "write:services",
    subscription.KIND: "write:subscriptions",
}


class MissingPermission(Exception):
    """The caller lacks a permission; nothing was changed or shown."""

    def __init__(self, permission: str) -> None:
        super().__init__(f"missing required scope: {permission}")
        self.permission = permission


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Describe who runs a use case, for which tenant, under which conditions.

    Attributes:
        tenant_id: The only tenant that the use case sees.
        actor: The actor that the ledger records.
        permissions: The permissions; callers of our own, such as the scheduler, have all.
        request_id: The id of the request, for the ledger and for logs.
        name: The actor's name where it is known already, such as the name of an API token.
        idempotency_key: Makes a command safe to send again.
        expected_versions: The stream versions that a command accepts; `None` accepts any.
        min_position: The ledger position that a query must show.
    """

    tenant_id: int
    actor: Actor
    permissions: Collection[str] = ALL_PERMISSIONS
    request_id: str | None = None
    name: str | None = None
    idempotency_key: IdempotencyKey | None = None
    expected_versions: Collection[int] | None = None
    min_position: int = 0

    def require(self, permission: Permission) -> None:
        """Refuse a caller without `permission`.

        Raises:
            MissingPermission: The caller lacks it.
        """
        if permission not in self.permissions:
            raise MissingPermission(permission)
