"""The JSON that webhooks get: version 1. The structs say what it is, and make `webhook.schema.json`.

A body has less than 20,000 bytes, because receivers limit them (the Standard Webhooks specification recommends it):
what is too long loses its oldest timeline entries first, then the ends of its texts and lists, and says so.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from opsentry.notifications.channel import Message

VERSION = 1
MAX_BYTES = 20_000
_CHANGES = 50
# What is left of each text (characters) and each list (entries), until it fits. The last fits whatever it is made of:
# a character may take six bytes.
_STEPS = ((4_000, 1_000), (2_000, 200), (1_000, 50), (400, 20), (100, 20), (50, 20))
_REMEMBERED = 256


Moment: TypeAlias = Annotated[datetime, Meta(tz=True)]


class TenantRef(msgspec.Struct):
    """Whose status it is."""

    slug: str
    name: str


class ChangeRef(msgspec.Struct):
    """One of the events that the message tells: position in the tenant's ledger, type, when it was recorded."""

    position: int
    type: str
    at: Moment


class ServiceLink(msgspec.Struct):
    """A service that is affected."""

    id: int
    slug: str
    name: str


class Update(msgspec.Struct, kw_only=True):
    """An entry of a timeline. `is_public` and `author` are there for the audience `internal` only."""

    id: int
    status: str
    message: str
    is_public: bool | UnsetType = UNSET
    author: str | UnsetType = UNSET
    created_at: Moment


class _Subject(msgspec.Struct, kw_only=True):
    id: int
    title: str
    description: str | None
    status: str
    visibility: Literal["public", "internal"] | UnsetType = UNSET
    services: Sequence[ServiceLink]
    service_ids: Sequence[int]
    created_at: Moment
    updated_at: Moment
    updates: Sequence[Update]
    updates_omitted: int | UnsetType = UNSET
    services_omitted: int | UnsetType = UNSET
    service_ids_omitted: int | UnsetType = UNSET
    shortened: Sequence[str] | UnsetType = UNSET


class Incident(_Subject, kw_only=True):
    """An incident. `visibility`, `root_cause` and `postmortem` are there for the audience `internal` only."""

    severity: str
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET
    occurred_at: Moment
    resolved_at: Moment | None


class Maintenance(_Subject, kw_only=True):
    """A maintenance window. `visibility` is there for the audience `internal` only."""

    scheduled_start: Moment
    scheduled_end: Moment
    started_at: Moment | None
    completed_at: Moment | None
    cancelled_at: Moment | None
    exclude_from_sla: bool
    suppress_alerts: bool
    auto_start: bool
    auto_complete: bool


class Data(msgspec.Struct, omit_defaults=True):
    """The thing itself, as it was at `position`: one of these."""

    incident: Incident | UnsetType = UNSET
    maintenance: Maintenance | UnsetType = UNSET
    subscription: dict[str, Any] | UnsetType = UNSET


class Payload(msgspec.Struct, kw_only=True):
    """The body of a webhook. Fields that you do not know are to be ignored: more may come."""

    version: Annotated[Literal[1], Meta(description="Of this format. It changes where a field changes or goes.")]
    id: Annotated[str, Meta(description="The same as the header webhook-id, whichever attempt it is.")]
    type: Annotated[str, Meta(description="What happened, such as incident.opened.")]
    timestamp: Annotated[datetime, Meta(tz=True, description="When the last of the changes was recorded, in UTC.")]
    position: Annotated[int, Meta(description="The position of the last change in the tenant's ledger. It only rises.")]
    tenant: TenantRef
    changes: Annotated[Sequence[ChangeRef], Meta(description="What is told, oldest first; the newest 50 at most.")]
    data: Data


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `Payload`."""
    made = msgspec.json.schema(Payload)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Opsentry webhook", **made}


_Key: TypeAlias = tuple[object, ...]


class Bodies:
    """Makes bodies. What is the same for all subscriptions that are told the same is encoded once."""

    def __init__(self) -> None:
        # With the subject itself, so that no other can come to have its identity.
        self._rests: OrderedDict[_Key, tuple[Mapping[str, Any], bytes]] = OrderedDict()

    def body(self, message: Message) -> bytes:
        """Return the message as the body of a webhook."""
        head = b'{"version":%d,"id":%b,' % (VERSION, msgspec.json.encode(message.id))
        tenant = message.tenant
        key: _Key = (
            id(message.subject),
            message.type,
            message.subject_kind,
            message.position,
            tenant["slug"],
            tenant["name"],
        )
        key += tuple(change.position for change in message.changes)
        known = self._rests.get(key)
        if known is None:
            known = message.subject, _rest(message, MAX_BYTES - 1 - len(head))
            self._rests[key] = known
            if len(self._rests) > _REMEMBERED:
                self._rests.popitem(last=False)
        return head + known[1]


def _rest(message: Message, room: int) -> bytes:
    """Return what comes after the id, in at most `room` bytes."""
    changes = [
        ChangeRef(change.position, change.type, change.recorded_at.astimezone(UTC))
        for change in message.changes[-_CHANGES:]
    ]
    around = {
        "type": message.type,
        "timestamp": message.recorded_at.astimezone(UTC),
        "position": message.position,
        "tenant": message.tenant,
        "changes": changes,
        "data": {message.subject_kind: None},
    }
    start = msgspec.json.encode(around).removesuffix(b"null}}")[1:]
    return start + fit(message.subject, room - len(start) - 2) + b"}}"


def fit(subject: Mapping[str, Any], room: int) -> bytes:
    """Return `subject` as JSON of at most `room` bytes, which are to be some 10,000 or more.

    Oldest entries of `updates` are left out first, all but the last; how many is in `updates_omitted`. Then long texts
    and lists are cut: `shortened` names the texts, `<list>_omitted` says how many entries are missing.
    """
    whole = msgspec.json.encode(subject)
    if len(whole) <= room:
        return whole
    room -= 400  # for what says what was cut
    fitted = dict(subject)
    updates = fitted.get("updates")
    if isinstance(updates, list) and len(updates) > 1:
        size, kept = len(msgspec.json.encode({**fitted, "updates": (), "updates_omitted": len(updates)})), 0
        for update in reversed(updates):
            size += len(msgspec.json.encode(update)) + 1
            if kept and size > room:
                break
            kept += 1
        fitted["updates"] = updates[-kept:]
        fitted["updates_omitted"] = len(updates) - kept
    for characters, entries in _STEPS:
        if len(msgspec.json.encode(fitted)) <= room:
            break
        shortened: dict[str, None] = {}
        fitted = {name: _cut(value, name, characters, entries, shortened) for name, value in fitted.items()}
        for name, value in subject.items():
            if name != "updates" and isinstance(value, list) and len(value) > entries:
                fitted[f"{name}_omitted"] = len(value) - entries
        fitted["shortened"] = list(dict.fromkeys([*fitted.get("shortened", ()), *shortened]))
    return msgspec.json.encode(fitted)


def _cut(value: Any, name: str, characters: int, entries: int, shortened: dict[str, None]) -> Any:
    if isinstance(value, str) and len(value) > characters:
        shortened[name] = None
        return value[: characters - 1] + "…"
    if isinstance(value, list) and name != "shortened":
        return [_cut(each, name, characters, entries, shortened) for each in value[:entries]]
    if isinstance(value, dict):
        return {inner: _cut(each, f"{name}.{inner}", characters, entries, shortened) for inner, each in value.items()}
    return value
