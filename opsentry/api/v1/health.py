"""`/api/v1/health`: verify a token."""

import msgspec
from aiohttp import web

from opsentry.api.v1.schemas import TokenInfo
from opsentry.http.body import NoBody
from opsentry.http.context import RequestContext
from opsentry.http.operation import operation
from opsentry.http.params import NoQuery
from opsentry.http.responses import json_response


@operation("GET", "/api/v1/health", tag="Health", result=TokenInfo)
async def verify_token(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Verify the token.

    Returns the tenant, the token's public prefix and its scopes. Needs no scope.
    """
    caller = context.caller
    info = TokenInfo(
        ok=True,
        tenant_id=caller.tenant_id,
        token_prefix=context.token_prefix,
        scopes=sorted(caller.permissions),
    )
    return json_response(msgspec.json.encode(info))


OPERATIONS = (verify_token,)
