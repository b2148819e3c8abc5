"""Stand-in."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from opsentry.postgres import Database
from opsentry.projections.moments import Moments


def message_type(topics: Sequence[str]) -> str:
    """Stand-in."""
    return {"subscription.created": "subscription.confirm"}.get(topics[-1], topics[-1])


class Composer:
    """Stand-in."""

    def __init__(self, moments: Moments, database: Database) -> None:
        self._moments = moments

    async def tenant(self, tenant_id: int) -> Mapping[str, str]:
        """Stand-in."""
        return {"slug": str(tenant_id), "name": "x"}

    async def compose(
        self, tenant_id: int, kind: str, stream_id: int, sequence: int, audience: str
    ) -> Mapping[str, Any] | None:
        """Stand-in."""
        one = await self._moments.incident(tenant_id, stream_id, sequence)
        return None if one is None else msgspec.json.decode(one.body)
