"""Render the result of a command: the whole resource as the command left it."""

from collections.abc import Mapping, Sequence
from typing import Any

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.pipeline import Outcome
from opsentry.application.results import Resource
from opsentry.events.codec import RecordedEvent
from opsentry.events.command_handler import CommandResult
from opsentry.identity import api_tokens
from opsentry.infrastructure.postgres import DatabaseUnavailable, OutcomeUnknown
from opsentry.projections.as_of import Render
from opsentry.projections.services import ServiceLinks, links_from_row
from opsentry.projections.timeline import etag


async def render_outcome(app: Application, caller: Caller, outcome: Outcome, render: Render) -> Resource:
    """Return the resource that a command changed, with its service links and the names of its authors.

    Raises:
        OutcomeUnknown: The command is recorded, but the database was lost before its result could be read.
    """
    result = outcome.result
    try:
        links, versions = await _links(app, caller, outcome)
        names = await _author_names(app, caller, result.history)
    except DatabaseUnavailable as error:
        raise OutcomeUnknown("recorded, but could not be read back") from error
    body = render(result.history, links, names)
    return _resource(result, body, etag(result.version, versions))


def render_plain(outcome: Outcome, body: bytes) -> Resource:
    """Return a resource that links no services."""
    return _resource(outcome.result, body, etag(outcome.result.version, ()))


def _resource(result: CommandResult[Any], body: bytes, tag: str) -> Resource:
    return Resource(result.stream_id, body, tag, result.position, replayed=result.replayed)


async def _links(app: Application, caller: Caller, outcome: Outcome) -> ServiceLinks:
    """Return the links to services; with an idempotency key as of the command, so that every repeat has the same."""
    service_ids = outcome.result.state.service_ids
    if not service_ids:
        return {}, ()
    if caller.idempotency_key is not None:
        return await app.as_of_queries.get_service_links(caller.tenant_id, service_ids, outcome.result.ledger_position)
    if outcome.links is not None and outcome.links[0].keys() == set(service_ids):
        return outcome.links
    return links_from_row(await app.service_links.read(caller.tenant_id, service_ids), service_ids)


async def _author_names(app: Application, caller: Caller, history: Sequence[RecordedEvent]) -> Mapping[int, str]:
    """Return the names of the API tokens that wrote `history`, by id."""
    ids = {e.meta.actor.id for e in history if e.meta.actor.kind == "token" and e.meta.actor.id}
    names: dict[int, str] = {}
    if caller.actor.kind == "token" and caller.actor.id is not None and caller.name is not None:
        names[caller.actor.id] = caller.name
    if others := ids - names.keys():
        async with app.database.connection() as connection:
            names |= await api_tokens.find_api_token_names(connection, caller.tenant_id, others)
    return names
