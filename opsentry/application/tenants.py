"""Use cases of tenants: create, find, list. They belong to operators, so no caller of a tenant may run them."""

from collections.abc import Sequence

from opsentry.application.application import Application
from opsentry.events.codec import Actor, Meta
from opsentry.identity import tenants
from opsentry.infrastructure.postgres import Record


async def create_tenant(app: Application, actor: Actor, *, slug: str, name: str) -> int:
    """Create a tenant with its first event; return its id.

    Raises:
        InvalidField: The slug or the name is unusable.
        SlugTaken: Another tenant has the slug.
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection() as connection:
        return await tenants.create_tenant(connection, slug=slug, name=name, meta=Meta(actor))


async def find_tenant_id(app: Application, slug: str) -> int:
    """Return the id of the tenant with this slug.

    Raises:
        TenantNotFound: No tenant has the slug.
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection() as connection:
        return int((await tenants.find_tenant(connection, slug))["tenant_id"])


async def list_tenants(app: Application) -> Sequence[Record]:
    """Return `tenant_id`, `slug`, `name` and `created_at` of all tenants, by slug.

    Raises:
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection() as connection:
        return await tenants.list_tenants(connection)
