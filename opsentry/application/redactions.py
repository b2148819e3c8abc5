"""Redact what people wrote about an incident or a maintenance window, for good."""

from collections.abc import Collection, Sequence

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.ledger import get_stream_history
from opsentry.application.pipeline import run
from opsentry.application.rendering import render_outcome
from opsentry.application.results import Resource
from opsentry.domain import incident, maintenance
from opsentry.domain.incident import RedactIncident
from opsentry.domain.maintenance import RedactMaintenance
from opsentry.domain.redaction import plan_redaction
from opsentry.events.codec import RecordedEvent, history_entries
from opsentry.projections import incident_view, maintenance_view

_REDACTABLE_FIELDS = {
    incident.KIND: incident.REDACTABLE_FIELDS,
    maintenance.KIND: maintenance.REDACTABLE_FIELDS,
}


async def preview_redaction(
    app: Application,
    caller: Caller,
    kind: str,
    stream_id: int,
    *,
    fields: Collection[str],
    positions: Collection[int],
) -> list[int]:
    """Return the positions of the events that a redaction would erase text of; nothing is changed.

    Raises:
        MissingPermission: The caller may not read the ledger.
        NotFound: The tenant has no such stream.
        InvalidField: A field or position has no text.
        DatabaseUnavailable: The database was lost.
    """
    history = (await get_stream_history(app, caller, kind, stream_id)).recorded
    versions = plan_redaction(history_entries(history), _REDACTABLE_FIELDS[kind], fields, positions).versions
    return [event.position for event in history if event.version in versions]


async def redact_incident(
    app: Application,
    caller: Caller,
    incident_id: int,
    *,
    fields: Collection[str],
    positions: Collection[int],
    reason: str,
) -> Resource:
    """Erase text of an incident: every value of `fields`, and the text of the events at `positions`.

    Raises:
        MissingPermission: The caller may not read the ledger or not write incidents.
        InvalidField: A field or position has no text, or the reason is blank.
    Further, raises as `pipeline.run`.
    """
    caller.require("read:audit")

    def command(_: object, history: Sequence[RecordedEvent]) -> RedactIncident:
        return RedactIncident(
            plan=plan_redaction(history_entries(history), incident.REDACTABLE_FIELDS, fields, positions), reason=reason
        )

    outcome = await run(app, caller, incident.DECIDER, command, stream_id=incident_id)
    return await render_outcome(app, caller, outcome, incident_view.render)


async def redact_maintenance(
    app: Application,
    caller: Caller,
    maintenance_id: int,
    *,
    fields: Collection[str],
    positions: Collection[int],
    reason: str,
) -> Resource:
    """Erase text of a maintenance window; see `redact_incident`."""
    caller.require("read:audit")

    def command(_: object, history: Sequence[RecordedEvent]) -> RedactMaintenance:
        return RedactMaintenance(
            plan=plan_redaction(history_entries(history), maintenance.REDACTABLE_FIELDS, fields, positions),
            reason=reason,
        )

    outcome = await run(app, caller, maintenance.DECIDER, command, stream_id=maintenance_id)
    return await render_outcome(app, caller, outcome, maintenance_view.render)
