"""Encode messages as the JSON that webhooks receive (version 1).

The structs describe the format; `webhook.schema.json` is generated from them.

A payload has fewer than 20,000 bytes, as the Standard Webhooks specification recommends, because receivers limit it.
A longer one loses its oldest timeline entries first, then the ends of its texts and lists. Fields name the missing
parts.
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
_MAX_CHANGES = 50
# The most characters of each text and entries of each list, tried in this order until the payload fits.
# The last pair fits any subject: JSON needs at most six bytes for a character.
_LIMITS = ((4_000, 1_000), (2_000, 200), (1_000, 50), (400, 20), (100, 20), (50, 20))
# Room for the fields that say what is missing.
_OMISSION_BYTES = 400
_CACHE_ENTRIES = 256


Timestamp: TypeAlias = Annotated[datetime, Meta(tz=True)]


class TenantRef(msgspec.Struct):
    """The tenant that the message is about."""

    slug: str
    name: str


class ChangeRef(msgspec.Struct):
    """An event that the message reports: its position in the tenant's ledger, its type, and when it was recorded."""

    position: int
    type: str
    recorded_at: Timestamp


class ServiceLink(msgspec.Struct):
    """An affected service."""

    id: int
    slug: str
    name: str


class Update(msgspec.Struct, kw_only=True):
    """A timeline entry. Only the audience `internal` receives `is_public` and `author`."""

    id: int
    status: str
    message: str
    is_public: bool | UnsetType = UNSET
    author: str | UnsetType = UNSET
    created_at: Timestamp


class _Subject(msgspec.Struct, kw_only=True):
    id: int
    title: str
    description: str | None
    status: str
    visibility: Literal["public", "internal"] | UnsetType = UNSET
    services: Sequence[ServiceLink]
    service_ids: Sequence[int]
    created_at: Timestamp
    updated_at: Timestamp
    updates: Sequence[Update]
    updates_omitted: int | UnsetType = UNSET
    services_omitted: int | UnsetType = UNSET
    service_ids_omitted: int | UnsetType = UNSET
    shortened: Sequence[str] | UnsetType = UNSET


class Incident(_Subject, kw_only=True):
    """An incident. Only the audience `internal` receives `visibility`, `root_cause` and `postmortem`."""

    severity: str
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET
    occurred_at: Timestamp
    resolved_at: Timestamp | None


class Maintenance(_Subject, kw_only=True):
    """A maintenance window. Only the audience `internal` receives `visibility`."""

    scheduled_start: Timestamp
    scheduled_end: Timestamp
    started_at: Timestamp | None
    completed_at: Timestamp | None
    cancelled_at: Timestamp | None
    exclude_from_sla: bool
    suppress_alerts: bool
    auto_start: bool
    auto_complete: bool


class Data(msgspec.Struct, omit_defaults=True):
    """The incident, maintenance window or subscription as it was at `position`; exactly one is present."""

    incident: Incident | UnsetType = UNSET
    maintenance: Maintenance | UnsetType = UNSET
    subscription: dict[str, Any] | UnsetType = UNSET


class Payload(msgspec.Struct, kw_only=True):
    """The body of a webhook. Ignore fields that you do not know: later releases may add some."""

    version: Annotated[
        Literal[1], Meta(description="The version of this format. Adding a field keeps it; any other change raises it.")
    ]
    id: Annotated[str, Meta(description="The same as the header webhook-id, in every attempt.")]
    type: Annotated[str, Meta(description="The kind of news, such as incident.opened.")]
    timestamp: Annotated[datetime, Meta(tz=True, description="When the last change was recorded, in UTC.")]
    position: Annotated[int, Meta(description="The last change's position in the tenant's ledger.")]
    tenant: TenantRef
    changes: Annotated[
        Sequence[ChangeRef], Meta(description="The reported events, oldest first; at most the newest 50.")
    ]
    data: Data


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `Payload`."""
    generated = msgspec.json.schema(Payload)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Opsentry webhook", **generated}


_CacheKey: TypeAlias = tuple[object, ...]


class PayloadEncoder:
    """Encode payloads, and encode the part that all subscriptions share only once."""

    def __init__(self) -> None:
        # Each entry keeps its subject alive, so that no other object can get the `id` in the key.
        self._shared: OrderedDict[_CacheKey, tuple[Mapping[str, Any], bytes]] = OrderedDict()

    def encode(self, message: Message) -> bytes:
        """Return the message as the body of a webhook, in fewer than `MAX_BYTES`."""
        head = b'{"version":%d,"id":%b,' % (VERSION, msgspec.json.encode(message.id))
        tenant = message.tenant
        key: _CacheKey = (
            id(message.subject),
            message.type,
            message.subject_kind,
            message.position,
            tenant["slug"],
            tenant["name"],
        )
        key += tuple(change.position for change in message.changes)
        cached = self._shared.get(key)
        if cached is None:
            cached = message.subject, _encode_shared(message, MAX_BYTES - 1 - len(head))
            self._shared[key] = cached
            if len(self._shared) > _CACHE_ENTRIES:
                self._shared.popitem(last=False)
        return head + cached[1]


def _encode_shared(message: Message, max_bytes: int) -> bytes:
    """Return everything after the id, in at most `max_bytes`."""
    changes = [
        ChangeRef(change.position, change.type, change.recorded_at.astimezone(UTC))
        for change in message.changes[-_MAX_CHANGES:]
    ]
    envelope = {
        "type": message.type,
        "timestamp": message.recorded_at.astimezone(UTC),
        "position": message.position,
        "tenant": message.tenant,
        "changes": changes,
        "data": {message.subject_kind: None},
    }
    start = msgspec.json.encode(envelope).removesuffix(b"null}}")[1:]
    return start + fit(message.subject, max_bytes - len(start) - 2) + b"}}"


def fit(subject: Mapping[str, Any], max_bytes: int) -> bytes:
    """Return `subject` as JSON of at most `max_bytes`, which must be 10,000 or more.

    The oldest entries of `updates` go first, down to the newest one; `updates_omitted` counts them. Then long texts
    and lists are cut: `shortened` names the texts, and `<list>_omitted` counts the missing entries.
    """
    whole = msgspec.json.encode(subject)
    if len(whole) <= max_bytes:
        return whole
    max_bytes -= _OMISSION_BYTES
    fitted = dict(subject)
    updates = fitted.get("updates")
    if isinstance(updates, list) and len(updates) > 1:
        size, kept = len(msgspec.json.encode({**fitted, "updates": (), "updates_omitted": len(updates)})), 0
        for update in reversed(updates):
            size += len(msgspec.json.encode(update)) + 1
            if kept and size > max_bytes:
                break
            kept += 1
        fitted["updates"] = updates[-kept:]
        fitted["updates_omitted"] = len(updates) - kept
    for characters, entries in _LIMITS:
        if len(msgspec.json.encode(fitted)) <= max_bytes:
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
