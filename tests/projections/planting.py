"""Insert events that the code never writes, past the function that would refuse them."""

from typing import Any

BROKEN = {
    "type": "incident.updated",
    "schema_version": 1,
    "data": '{"status":"monitoring","erasable":["message"]}',
    "erasable": '{"message":"planted"}',
    "meta": '{"actor":{"kind":"operator"}}',
}


async def plant(
    owner: Any, tenant_id: int, stream_id: int, version: int, *, kind: str = "incident", **columns: Any
) -> int:
    """Put one event at the end of the ledger; returns its position. Columns that are not given are good ones."""
    values = BROKEN | columns
    async with owner.transaction():
        position = await owner.fetchval(
            "UPDATE ledger_heads SET position = position + 1, recorded_at = recorded_at + interval '1 microsecond'"
            " WHERE tenant_id = $1 RETURNING position",
            tenant_id,
        )
        await owner.execute(
            "INSERT INTO events SELECT tenant_id, position, $2, $3, $4, $5, $6, recorded_at, recorded_at, $7, $8, $9,"
            " ''::bytea, sha256(convert_to($9, 'UTF8')), sha256('') FROM ledger_heads WHERE tenant_id = $1",
            tenant_id,
            kind,
            stream_id,
            version,
            values["type"],
            values["schema_version"],
            values["data"],
            values["meta"],
            values["erasable"],
        )
        await owner.execute("INSERT INTO projection_backlog VALUES ($1, $2)", tenant_id, position)
    return int(position)


async def age(owner: Any, tenant_id: int) -> None:
    """Make the tenant's events an hour older than they are."""
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute(
        "UPDATE events SET recorded_at = recorded_at - interval '1 hour' WHERE tenant_id = $1", tenant_id
    )
    await owner.execute("ALTER TABLE events ENABLE ALWAYS TRIGGER events_append_only")
