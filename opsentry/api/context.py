"""What handlers read from requests."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import asyncpg
import msgspec
from aiohttp import web

from opsentry.api import request
from opsentry.api.errors import BadRequest, NotFound, NotJson
from opsentry.events import audit
from opsentry.events.audit import LedgerHead
from opsentry.events.command_handler import CommandHandler
from opsentry.identity.api_tokens import ApiToken, ApiTokens
from opsentry.identity.operator_tokens import OperatorTokens
from opsentry.infrastructure.encryption import SecretBox
from opsentry.infrastructure.postgres import Connection, Database
from opsentry.infrastructure.rate_limit import RateLimiter
from opsentry.notifications.channel import Channel
from opsentry.projections import services
from opsentry.projections.as_of import AsOfQueries
from opsentry.projections.engine.projector import PositionNotReached, Projector
from opsentry.projections.services import ServiceLinkLoader, ServiceLinks
from opsentry.settings import Settings

MAX_ID = 2**63 - 1
POLL_SECONDS = 0.05

T = TypeVar("T")

Id = Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What the API works with; put together in `wiring`."""

    settings: Settings
    database: Database
    commands: CommandHandler
    projector: Projector
    as_of_queries: AsOfQueries
    refs: ServiceLinkLoader
    tokens: ApiTokens
    operators: OperatorTokens
    channels: Mapping[str, Channel]
    secret_box: SecretBox
    limiter: RateLimiter
    failures: RateLimiter


@dataclass(slots=True)
class RequestContext:
    """One authenticated request."""

    request: web.Request
    request_id: str
    token: ApiToken
    parts: Dependencies
    headers: Mapping[str, str]
    """What every answer to the request carries."""
    octets: bytes = b""
    """The body, once it was read."""

    @property
    def tenant_id(self) -> int:
        """The tenant that the token belongs to: the only one this request can see."""
        return self.token.tenant_id

    def id(self) -> int:
        """Return the path's id; one that cannot exist is answered like one that does not."""
        raw = self.request.match_info["id"]
        if not re.fullmatch(r"[1-9][0-9]{0,18}", raw, re.ASCII) or int(raw) > MAX_ID:
            raise NotFound
        return int(raw)

    # ------------------------------------------------------------------------------------------ reading

    async def read(self, query: Callable[[Connection], Awaitable[asyncpg.Record]]) -> asyncpg.Record:
        """Return the row of a read model's query, showing all that was answered before.

        Raises:
            PositionNotReached: It cannot show yet what `Opsentry-Min-Position` asks for.
        """
        return await self.parts.projector.read(self.tenant_id, query, at_least=self._at_least())

    async def refs(self, service_ids: Sequence[int]) -> ServiceLinks:
        """Return how to link services that are about to be affected.

        Raises:
            BadRequest: One of them is not a service of this tenant, for whatever reason.
        """
        if not service_ids:
            return {}, ()
        row = await self.parts.refs.read(self.tenant_id, service_ids)
        links = services.links_from_row(row, service_ids)
        usable = links[0].keys() - set(row["retired"] or ())
        if unknown := sorted(set(service_ids) - usable):
            raise BadRequest(f"service_ids: no such service: {', '.join(map(str, unknown))}")
        return links

    async def as_of(self) -> int | None:
        """Return the position that the query parameter `as_of`, a time or a position, asks for; `None` without one.

        Raises:
            BadRequest: It is neither, or the ledger has not come so far.
        """
        raw = self.request.query.get("as_of", "")
        if re.fullmatch(r"[0-9]{1,19}", raw, re.ASCII):
            ends = (await self.head()).position
            if int(raw) > ends:
                raise BadRequest(f"as_of: the ledger ends at position {ends}")
            return int(raw)
        moment = self.moment("as_of", "a position, or an RFC 3339 timestamp")
        if moment is None:
            return None
        await self.head()
        async with self.parts.database.connection() as connection:
            found = await audit.position_at(connection, self.tenant_id, moment)
        if found is None:
            raise BadRequest("as_of: must not be in the future")
        return found

    def refuse(self, *names: str) -> None:
        """Raise `BadRequest` where these are asked for: what answers for now only must not seem to answer for then."""
        for name in names:
            if name in self.request.query:
                raise BadRequest(f"{name}: cannot be asked for here")

    async def head(self) -> LedgerHead:
        """Return where the tenant's ledger ends, once it has come as far as the request asks for.

        Raises:
            PositionNotReached: It has not, within a bounded time.
        """
        at_least, end = self._at_least(), time.monotonic() + self.parts.database.timeout_seconds
        while True:
            async with self.parts.database.connection() as connection:
                head = await audit.read_ledger_head(connection, self.tenant_id)
            if head.position >= at_least:
                return head
            if time.monotonic() > end:
                raise PositionNotReached(f"position {at_least} cannot be shown yet")
            await asyncio.sleep(POLL_SECONDS)

    def _at_least(self) -> int:
        raw = self.request.headers.get("Opsentry-Min-Position")
        if raw is None:
            return 0
        if not re.fullmatch(r"[0-9]{1,19}", raw, re.ASCII) or int(raw) > MAX_ID:
            raise BadRequest("Opsentry-Min-Position: must be a position, a whole number")
        return int(raw)

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

    def flag(self, name: str) -> bool:
        """Return the query parameter `name`, `true` or `false`; false if it is not there."""
        return self.choice(name, ("true", "false")) == "true"

    def moment(self, name: str, what: str = "an RFC 3339 timestamp,") -> datetime | None:
        """Return the time in the query parameter `name`, `None` if it is not there.

        Raises:
            BadRequest: It is no RFC 3339 timestamp.
        """
        raw = self.request.query.get(name)
        if raw is None:
            return None
        try:
            # A plus sign that was not escaped has come as a space.
            return utc(name, msgspec.convert(raw.strip().replace(" ", "+"), Moment))
        except msgspec.ValidationError:
            raise BadRequest(f"{name}: must be {what} such as 2026-06-01T02:00:00Z") from None

    def page(self, *, default: int, highest: int = 200) -> tuple[int, int]:
        """Return (limit, offset); a limit above `highest` is clamped.

        Raises:
            BadRequest: One of them is no number that can be used.
        """
        limit = self.number("limit", default, lowest=1)
        return min(limit, highest), self.number("offset", 0)

    def number(self, name: str, default: int, *, lowest: int = 0) -> int:
        """Return the query parameter `name`, `default` if it is not there.

        Raises:
            BadRequest: It is no whole number, or below `lowest`.
        """
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
        octets = self.octets = await request.octets(self.request, self.parts.settings.request_body_timeout_seconds)
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


# The driver writes these two moments as infinities.
_ENDS = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


def utc(field: str, moment: datetime) -> datetime:
    """Return `moment` in UTC; raise `BadRequest` where that lies outside of the calendar, or at one of its ends."""
    try:
        found = moment.astimezone(UTC)
    except OverflowError:
        raise BadRequest(f"{field}: is out of range") from None
    if found in _ENDS:
        raise BadRequest(f"{field}: is out of range")
    return found
