"""Tenants: each owns one ledger, which begins with its creation."""

import re
from collections.abc import Sequence

import asyncpg

from opsentry.domain.decider import InvalidField, check_title
from opsentry.domain.identity import TENANT, TenantCreated
from opsentry.events import store
from opsentry.events.codec import Meta
from opsentry.events.store import Append, NewEvent
from opsentry.infrastructure.postgres import Connection

_SLUG = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

# These statements cannot name a tenant as a parameter: they find it, or list all.
_SELECT_BY_SLUG = "SELECT tenant_id, slug, name, created_at FROM tenants WHERE slug = $1"
_SELECT_BY_ID = "SELECT tenant_id, slug, name, created_at FROM tenants WHERE tenant_id = $1"
_SELECT_ALL = "SELECT tenant_id, slug, name, created_at FROM tenants ORDER BY slug"

_INSERT = "INSERT INTO tenants (slug, name) VALUES ($1, $2) RETURNING tenant_id"


class SlugTaken(Exception):
    """Another tenant has this slug; nothing was created."""


class TenantNotFound(Exception):
    """No tenant has this slug or id."""


async def create_tenant(connection: Connection, *, slug: str, name: str, meta: Meta) -> int:
    """Create a tenant, record that as the first event of its ledger in the same transaction, and return its id.

    Args:
        connection: A connection of the application.
        slug: Names the tenant in URLs and commands: 1 to 63 of a-z, 0-9 and -, with no - at either end.
        name: Names the tenant on pages and in messages.
        meta: The actor and the request, for the ledger.

    Raises:
        InvalidField: The slug or the name does not fit.
        SlugTaken: Another tenant has the slug.
    """
    if not _SLUG.fullmatch(slug):
        raise InvalidField("slug", "must be 1 to 63 of a-z, 0-9 and -, with no - at either end")
    check_title("name", name)
    try:
        async with connection.transaction():
            tenant_id: int = await connection.fetchval(_INSERT, slug, name)
            event = NewEvent(TenantCreated(slug=slug, name=name), meta)
            append = Append(tenant_id=tenant_id, kind=TENANT, stream_id=tenant_id, expected_version=0, events=[event])
            await store.append_events(connection, [append], wait=True)
    except asyncpg.UniqueViolationError:
        raise SlugTaken(f"slug: {slug} is taken") from None
    return tenant_id


async def find_tenant(connection: Connection, slug: str) -> asyncpg.Record:
    """Return the row of the tenant with this slug: `tenant_id`, `slug`, `name`, `created_at`.

    Raises:
        TenantNotFound: There is no such tenant. The slug may be any text.
    """
    row = await connection.fetchrow(_SELECT_BY_SLUG, slug) if _SLUG.fullmatch(slug) else None
    if row is None:
        raise TenantNotFound(f"no tenant has the slug {slug}")
    return row


async def find_tenant_by_id(connection: Connection, tenant_id: int) -> asyncpg.Record:
    """Return the row of the tenant with this id: `tenant_id`, `slug`, `name`, `created_at`.

    Raises:
        TenantNotFound: There is no such tenant.
    """
    row = await connection.fetchrow(_SELECT_BY_ID, tenant_id)
    if row is None:
        raise TenantNotFound(f"no tenant has the id {tenant_id}")
    return row


async def list_tenants(connection: Connection) -> Sequence[asyncpg.Record]:
    """Return the rows of all tenants in the order of their slugs."""
    return list(await connection.fetch(_SELECT_ALL))
