"""Scopes: the permissions of an API token."""

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, get_args

from opsentry.domain.decider import InvalidField

Scope: TypeAlias = Literal[
    "read:status", "read:audit", "write:incidents", "write:maintenance", "write:services", "write:subscriptions"
]

SCOPES: tuple[Scope, ...] = get_args(Scope)

MEANINGS: Mapping[Scope, str] = {
    "read:status": "Read services, incidents, maintenance windows and uptime.",
    "read:audit": "Read the tenant's ledger. Together with a write scope: redact.",
    "write:incidents": "Declare, change, update and resolve incidents.",
    "write:maintenance": "Schedule, change, start, complete and cancel maintenance windows.",
    "write:services": "Create, change and remove services.",
    "write:subscriptions": "Read and change subscriptions and their deliveries.",
}
"""The permission that each scope grants."""


def check_scopes(scopes: Iterable[str]) -> list[Scope]:
    """Return `scopes` in the order of `SCOPES`, each once.

    Raises:
        InvalidField: There is none, or one is unknown.
    """
    wanted = set(scopes)
    if not wanted or wanted - set(SCOPES):
        raise InvalidField("scopes", f"must be one or more of {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in wanted]
