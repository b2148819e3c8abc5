"""Tenants: the owners of ledgers."""

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

# These find the tenant itself, so they are the only ones that cannot name it.
_BY_SLUG = "SELECT tenant_id, slug, name, created_at FROM tenants WHERE slug = $1"
_BY_ID = "SELECT tenant_id, slug, name, created_at FROM tenants WHERE tenant_id = $1"
_ALL = "SELECT tenant_id, slug, name, created_at FROM tenants ORDER BY slug"

_CREATE = "INSERT INTO tenants (slug, name) VALUES ($1, $2) RETURNING tenant_id"


# Whose a stream is: ids are given out once in a database, so at most one tenant has it.
_BY_STREAM = """
SELECT tenant_id, slug, name, created_at FROM tenants t WHERE EXISTS (
    SELECT FROM events e WHERE e.tenant_id = t.tenant_id AND e.stream_kind = $1 AND e.stream_id = $2 AND e.version = 1)
"""


class SlugTaken(Exception):
    """Another tenant has this slug."""


class TenantNotFound(Exception):
    """No tenant has this slug."""


async def create_tenant(connection: Connection, *, slug: str, name: str, meta: Meta) -> int:
    """Create a tenant, with its creation as the first event of its ledger; return its id.

    Raises:
        InvalidField: Slug or name cannot be used.
        SlugTaken: The slug is another tenant's.
    """
    if not _SLUG.fullmatch(slug):
        raise InvalidField("slug", "must be 1 to 63 of a-z, 0-9 and -, with no - at either end")
    check_title("name", name)
    try:
        async with connection.transaction():
            tenant_id: int = await connection.fetchval(_CREATE, slug, name)
            event = NewEvent(TenantCreated(slug=slug, name=name), meta)
            append = Append(tenant_id=tenant_id, kind=TENANT, stream_id=tenant_id, expected_version=0, events=[event])
            await store.append_events(connection, [append], wait=True)
    except asyncpg.UniqueViolationError:
        raise SlugTaken(f"slug: {slug} is taken") from None
    return tenant_id


async def find_tenant(connection: Connection, slug: str) -> asyncpg.Record:
    """Return the tenant's row.

    Raises:
        TenantNotFound: There is none with this slug, which may be no slug at all.
    """
    row = await connection.fetchrow(_BY_SLUG, slug) if _SLUG.fullmatch(slug) else None
    if row is None:
        raise TenantNotFound(f"no tenant has the slug {slug}")
    return row


async def find_tenant_by_id(connection: Connection, tenant_id: int) -> asyncpg.Record:
    """Return the row of the tenant with this id.

    Raises:
        TenantNotFound: There is none.
    """
    row = await connection.fetchrow(_BY_ID, tenant_id)
    if row is None:
        raise TenantNotFound(f"there is no tenant {tenant_id}")
    return row


async def of_stream(connection: Connection, kind: str, stream_id: int) -> asyncpg.Record:
    """Return the row of the tenant that has this stream.

    Raises:
        TenantNotFound: None has.
    """
    row = await connection.fetchrow(_BY_STREAM, kind, stream_id)
    if row is None:
        raise TenantNotFound(f"there is no {kind} {stream_id}")
    return row


async def list_tenants(connection: Connection) -> Sequence[asyncpg.Record]:
    """Return all tenants' rows, by slug."""
    return list(await connection.fetch(_ALL))
