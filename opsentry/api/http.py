"""What handlers read from requests, and the shapes of their answers."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import asyncpg
import msgspec
import structlog
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from opsentry.access import tokens
from opsentry.access.rate_limit import RateLimiter
from opsentry.access.tokens import Token, Tokens
from opsentry.api.errors import BadRequest, BodyBroken, BodyTooLarge, BodyTooSlow, NotFound, NotJson
from opsentry.config import Settings
from opsentry.events.codec import Actor, Meta
from opsentry.events.execute import Commands
from opsentry.postgres import Connection, Database, DatabaseUnavailable, OutcomeUnknown
from opsentry.projections import services
from opsentry.projections.projection import UNANSWERED_SECONDS
from opsentry.projections.runner import Runner
from opsentry.projections.services import RefsReader

_log = structlog.get_logger()

MAX_BODY = 64 * 1024
MAX_ID = 2**63 - 1
# How long a command waits for its projections before it is answered without them.
CATCH_UP_TIMEOUT = 0.7

T = TypeVar("T")

Id = Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the API works with; put together in `wiring`."""

    settings: Settings
    database: Database
    commands: Commands
    runner: Runner
    refs: RefsReader
    tokens: Tokens
    limiter: RateLimiter
    failures: RateLimiter


@dataclass(slots=True)
class Call:
    """One authenticated request."""

    request: web.Request
    request_id: str
    token: Token
    parts: Parts

    @property
    def tenant_id(self) -> int:
        """The tenant that the token belongs to: the only one this request can see."""
        return self.token.tenant_id

    @property
    def meta(self) -> Meta:
        """What the log keeps about who sent this."""
        return Meta(Actor("token", self.token.token_id), self.request_id)

    def id(self) -> int:
        """Return the path's id; one that cannot exist is answered like one that does not."""
        raw = self.request.match_info["id"]
        if not re.fullmatch(r"[1-9][0-9]{0,18}", raw, re.ASCII) or int(raw) > MAX_ID:
            raise NotFound
        return int(raw)

    # ------------------------------------------------------------------------------------------ reading

    async def read(self, query: Callable[[Connection], Awaitable[asyncpg.Record]]) -> asyncpg.Record:
        """Return the row of a read model's query, showing all that was answered before."""
        return await self.parts.runner.read(self.tenant_id, query)

    async def refs(self, service_ids: Sequence[int]) -> dict[int, msgspec.Raw]:
        """Return how to link services that are about to be affected.

        Raises:
            BadRequest: One of them is not a service of this tenant, for whatever reason.
        """
        if not service_ids:
            return {}
        row = await self.parts.refs.read(self.tenant_id, service_ids)
        refs = services.refs_of(row)
        usable = refs.keys() - set(row["retired"] or ())
        if unknown := sorted(set(service_ids) - usable):
            raise BadRequest(f"service_ids: no such service: {', '.join(map(str, unknown))}")
        return refs

    async def catch_up(self, seq: int) -> None:
        """Bring the read models up to an event that was just appended.

        It is durable, so nothing that goes wrong here makes the command fail: whoever reads next, or the worker,
        catches up. But then the answer waits until reads no longer take the event for one that is under way.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(CATCH_UP_TIMEOUT):
                await self.parts.runner.catch_up(self.tenant_id, seq)
        except Exception as error:  # noqa: BLE001 - whatever it is, the command was carried out
            _log.warning("answered before projecting", request_id=self.request_id, error=type(error).__name__)
            await asyncio.sleep(max(0.0, began + 1.1 * UNANSWERED_SECONDS - time.monotonic()))

    async def links(
        self, service_ids: Sequence[int], token_ids: set[int]
    ) -> tuple[dict[int, msgspec.Raw], dict[int, str]]:
        """Return service links and token names for the answer to a command that is durable.

        Raises:
            OutcomeUnknown: The database was lost after the command.
        """
        own = {self.token.token_id: self.token.name}
        try:
            row = None
            if service_ids:
                row = await self.parts.refs.read(self.tenant_id, service_ids)
            if others := token_ids - own.keys():
                async with self.parts.database.connection() as connection:
                    own |= await tokens.names(connection, self.tenant_id, others)
        except DatabaseUnavailable as error:
            raise OutcomeUnknown("recorded, but could not be read back") from error
        return {} if row is None else services.refs_of(row), own

    # ------------------------------------------------------------------------------------------ query string

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """Return the query parameter `name`, `None` if it is not there.

        Raises:
            BadRequest: It is none of `choices`.
        """
        value = self.request.query.get(name)
        if value is not None and value not in choices:
            raise BadRequest(f"{name}: must be one of {', '.join(choices)}")
        return value

    def text(self, name: str) -> str | None:
        """Return the query parameter `name`, `None` if it is not there or empty."""
        value = self.request.query.get(name)
        if value is not None and "\x00" in value:
            raise BadRequest(f"{name}: must not contain the character NUL")
        return value or None

    def page(self, *, default: int, highest: int = 200) -> tuple[int, int]:
        """Return (limit, offset); a limit above `highest` is clamped.

        Raises:
            BadRequest: One of them is no number that can be used.
        """
        limit = self._number("limit", default, lowest=1)
        return min(limit, highest), self._number("offset", 0, lowest=0)

    def _number(self, name: str, default: int, *, lowest: int) -> int:
        raw = self.request.query.get(name)
        if raw is None:
            return default
        if not re.fullmatch(r"[0-9]{1,19}", raw, re.ASCII) or not lowest <= int(raw) <= MAX_ID:
            raise BadRequest(f"{name}: must be a whole number, {lowest} or more")
        return int(raw)

    # ------------------------------------------------------------------------------------------ body

    async def body(self, type_: type[T], *, optional: bool = False) -> T:
        """Return the JSON body as `type_`. An empty one stands for `{}` where the body is `optional`.

        Raises:
            BodyTooLarge, BodyTooSlow, BodyBroken, NotJson, BadRequest: It is not what it should be.
        """
        octets = await self._octets()
        if not octets.strip() and optional:
            octets = b"{}"
        else:
            media_type = self.request.content_type
            if media_type != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", media_type):
                raise NotJson
        try:
            return _decoder(type_).decode(octets)
        except msgspec.ValidationError as error:
            raise BadRequest(_explain(str(error))) from None
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise BadRequest("body: not well-formed JSON") from None
        except RecursionError:
            raise BadRequest("body: nested too deeply") from None

    async def _octets(self) -> bytes:
        if (self.request.content_length or 0) > MAX_BODY:
            raise BodyTooLarge
        try:
            async with asyncio.timeout(self.parts.settings.body_timeout):
                return await self.request.read()
        except TimeoutError:
            raise BodyTooSlow from None
        except web.HTTPRequestEntityTooLarge:
            raise BodyTooLarge from None
        except (web.RequestPayloadError, ConnectionResetError):
            raise BodyBroken from None


_DECODERS: dict[type[Any], msgspec.json.Decoder[Any]] = {}


def _decoder(type_: type[T]) -> "msgspec.json.Decoder[T]":
    decoder = _DECODERS.get(type_)
    if decoder is None:
        decoder = _DECODERS[type_] = msgspec.json.Decoder(type_)
    return decoder


# msgspec's words on the left, ours on the right; what matches none is passed on as it is.
_EXPLANATIONS = (
    (r"Object missing required field `(.+)`", r"is required"),
    (r"Expected `datetime` with a timezone component", "must have a time zone, such as 2026-06-01T02:00:00Z"),
    (r"Invalid RFC3339 encoded datetime", "must be an RFC 3339 timestamp, such as 2026-06-01T02:00:00Z"),
    (r"Expected `datetime(?: \| null)?`, got `.+`", "must be an RFC 3339 timestamp, such as 2026-06-01T02:00:00Z"),
    (r"Expected `str \| null`, got `.+`", "must be a string or null"),
    (r"Expected `str`, got `.+`", "must be a string"),
    (r"Expected `bool`, got `.+`", "must be true or false"),
    (r"Expected `int`, got `.+`", "must be an integer"),
    (r"Expected `array(?: \| null)?`, got `.+`", "must be an array"),
    (r"Expected `object`, got `.+`", "must be a JSON object"),
    (r"Expected `int` (>=|<=) (.+)", f"must be an integer from 1 to {MAX_ID}"),
    (r"Integer value out of range", f"must be an integer from 1 to {MAX_ID}"),
)


def _explain(message: str) -> str:
    """Return what is wrong with a body in the sender's words: the field's name and what it must be."""
    problem, _, path = message.partition(" - at `$")
    field = path.rstrip("`").removeprefix(".") or "body"
    if choices := _CHOICES.get(field):
        return f"{field}: must be one of {', '.join(choices)}"
    for pattern, words in _EXPLANATIONS:
        if match := re.fullmatch(pattern, problem):
            return f"{match[1] if words == 'is required' else field}: {words}"
    return f"{field}: {problem}"


_CHOICES: dict[str, Sequence[str]] = {}


def name_choices(choices: Mapping[str, Sequence[str]]) -> None:
    """Note what the words of a field may be, for the message when it is not a word at all."""
    _CHOICES.update(choices)


def utc(field: str, moment: datetime) -> datetime:
    """Return `moment` in UTC; raise `BadRequest` where that lies outside of the calendar."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise BadRequest(f"{field}: is out of range") from None


# ---------------------------------------------------------------------------------------------------- answers


_JSON = CIMultiDict({"Content-Type": "application/json; charset=utf-8"})


def object_response(body: bytes, *, status: int = 200, version: int | None = None) -> web.Response:
    """Return a single thing; `version` is its stream's, from which the ETag is made."""
    response = web.Response(status=status, body=body, headers=_JSON)
    if version is not None:
        response.headers["ETag"] = f'"{version}"'
    return response


def list_response(call: Call, name: str, row: asyncpg.Record, page: tuple[int, int] | None = None) -> web.Response:
    """Return a list of stored answers: joined, never decoded.

    Args:
        call: The request.
        name: What the array is called.
        row: With `items`, the inside of a JSON array in UTF-8 or NULL, and `total` where there are pages.
        page: (limit, offset); without, the array stands alone.
    """
    opening, items = f'{{"{name}":['.encode(), row["items"] or b""
    if page is None:
        return _with_lag(object_response(b"".join((opening, items, b"]}"))), row)
    limit, offset = page
    total = row["total"]
    closing = f'],"total":{total},"limit":{limit},"offset":{offset}}}'.encode()
    response = object_response(b"".join((opening, items, closing)))
    links = []
    if offset + limit < total:
        links.append(_link(call.request.rel_url, limit, offset + limit, "next"))
    if offset > 0:
        links.append(_link(call.request.rel_url, limit, max(0, offset - limit), "prev"))
    if links:
        response.headers["Link"] = ", ".join(links)
    return _with_lag(response, row)


def one_response(row: asyncpg.Record) -> web.Response:
    """Return the thing in `row`.

    Raises:
        NotFound: There is none.
    """
    if row["body"] is None:
        raise NotFound
    return _with_lag(object_response(row["body"], version=row["version"]), row)


def _with_lag(response: web.Response, row: asyncpg.Record) -> web.Response:
    # Seen only where a read model could not be brought up to date in time: better old than nothing, but said.
    if (lag := row["head"] - (row["position"] or 0)) > 0:
        response.headers["Opsentry-Lag"] = str(lag)
    return response


def _link(url: URL, limit: int, offset: int, relation: str) -> str:
    """Return one link value of RFC 8288."""
    return f'<{url.update_query(limit=limit, offset=offset)}>; rel="{relation}"'
