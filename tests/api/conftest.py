"""Fixtures and helpers that the tests of several endpoints share."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from multidict import CIMultiDict

from opsentry import bootstrap
from opsentry.bootstrap import Core
from opsentry.domain import service
from opsentry.domain.service import ChangeService
from opsentry.events import store
from opsentry.identity import api_tokens, operator_tokens
from opsentry.notifications.channel import BadTarget, Endpoint, Message, Outcome
from opsentry.notifications.channels import channels
from tests import commands
from tests.conftest import META, Client, Tenant, make_service

DRILL = {"title": "Drill", "scheduled_start": "2036-06-01T02:00:00Z", "scheduled_end": "2036-06-01T04:00:00Z"}
CANARY = "CANARY"
HOUR = timedelta(hours=1)
HOOK = {"channel": "webhook", "target": "https://example.com/hook"}
SLACK = {"channel": "slack", "target": "https://hooks.slack.com/services/T000/B000/XXXXYYYYZZZZ"}
MAIL = {"channel": "email", "target": "ops@example.org"}

# The commands that change an existing resource: method, path, body.
CHANGING_COMMANDS: tuple[tuple[str, str, Any], ...] = (
    ("PATCH", "/incidents/{incident}", {"title": "B"}),
    ("POST", "/incidents/{incident}/updates", {"message": "M"}),
    ("POST", "/incidents/{incident}/resolve", {}),
    ("POST", "/incidents/{incident}/redactions", {"fields": ["title"], "reason": "R"}),
    ("PATCH", "/maintenance/{scheduled}", {"title": "B", "scheduled_end": "2036-06-01T05:00:00Z"}),
    ("POST", "/maintenance/{scheduled}/start", None),
    ("POST", "/maintenance/{active}/complete", None),
    ("POST", "/maintenance/{scheduled}/cancel", None),
    ("POST", "/maintenance/{scheduled}/redactions", {"fields": ["title"], "reason": "R"}),
)
UNCHANGING_COMMAND = ("PATCH", "/incidents/{incident}", {"title": "A"})
READ_PATHS = (
    "/incidents",
    "/incidents?status=investigating&limit=1",
    "/incidents/active",
    "/incidents/{incident}",
    "/services",
    "/services?status=operational",
    "/services/{service}",
    "/services/{service}/uptime",
    "/maintenance",
    "/maintenance/upcoming",
    "/maintenance/{scheduled}",
    "/events/head",
)
REPEATED_HEADERS = ("ETag", "Location", "Opsentry-Position", "Content-Type")
KEY = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
# One request of each command: method, path, body.
KEYED_REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "declare": ("POST", "/incidents", {"title": "New", "description": "Told", "severity": "critical"}),
    "change": ("PATCH", "/incidents/{incident}", {"title": "Changed", "severity": "major_outage"}),
    "update": ("POST", "/incidents/{incident}/updates", {"message": "Found", "status": "identified"}),
    "resolve": ("POST", "/incidents/{incident}/resolve", {"root_cause": "DNS"}),
    "redact incident": ("POST", "/incidents/{incident}/redactions", {"fields": ["description"], "reason": "Name"}),
    "schedule": ("POST", "/maintenance", {**DRILL, "title": "New", "description": "Told"}),
    "change window": (
        "PATCH",
        "/maintenance/{scheduled}",
        {"title": "Changed", "suppress_alerts": True, "scheduled_start": "2036-06-01T01:00:00Z"},
    ),
    "start": ("POST", "/maintenance/{scheduled}/start", {}),
    "complete": ("POST", "/maintenance/{active}/complete", {}),
    "cancel": ("POST", "/maintenance/{scheduled}/cancel", {}),
    "redact window": ("POST", "/maintenance/{scheduled}/redactions", {"fields": ["title"], "reason": "Name"}),
}
CREATING = {"declare", "schedule"}

each_changing_command = pytest.mark.parametrize(("method", "path", "body"), CHANGING_COMMANDS)
each_read = pytest.mark.parametrize("path", READ_PATHS)
each_keyed_request = pytest.mark.parametrize("name", KEYED_REQUESTS)


@dataclass
class StandIn:
    """A channel that sends nothing."""

    name: str
    mark: str
    signs_messages: bool = False
    has_secret_target: bool = False

    def validate_target(self, target: str) -> str:
        if self.mark not in target:
            raise BadTarget(f"must have {self.mark} in it")
        return target.strip()

    def display_target(self, target: str) -> str:
        return f"{target.rsplit('/', 1)[0]}/…" if self.has_secret_target else target

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        raise NotImplementedError

    async def close(self) -> None:
        pass


STAND_INS = (
    StandIn("webhook", "https://", signs_messages=True),
    StandIn("slack", "https://hooks.slack.com/", has_secret_target=True),
    StandIn("email", "@"),
)


@pytest.fixture(autouse=True)
def _known_channels(monkeypatch):
    stand_ins = {channel.name: channel for channel in STAND_INS}
    monkeypatch.setattr(bootstrap, "channels", lambda parts: {**stand_ins, **channels(parts)})


async def make_token(parts, tenant_id, *scopes, **fields):
    async with parts.database.connection() as connection:
        return await api_tokens.create_api_token(connection, tenant_id, name="t", scopes=scopes, meta=META, **fields)


async def make_operator(parts, **fields):
    async with parts.database.connection() as connection:
        return await operator_tokens.create_operator_token(connection, name="on call", **fields)


async def carry_out(parts, decider, tenant_id, stream_id, command):
    """Carry out a command, with or without an endpoint, and wait until the read models show it."""
    executed = await commands.change(parts, decider, tenant_id, stream_id, command, META)
    await parts.projector.catch_up(tenant_id, executed.position)


async def make_subscription(api, body=HOOK, **fields):
    """Create a subscription and return its id."""
    status, made, _ = await api.post("/subscriptions", {**body, **fields})
    assert status == 201, made
    return made["id"]


async def make_resources(api, incident, scheduled, active):
    """Create an incident, a scheduled window and an active one of the given fields, and return their ids."""
    _, incident, _ = await api.post("/incidents", incident)
    _, scheduled, _ = await api.post("/maintenance", {**DRILL, **scheduled})
    _, active, _ = await api.post("/maintenance", {**DRILL, **active})
    await api.post(f"/maintenance/{active['id']}/start")
    return {"incident": incident["id"], "scheduled": scheduled["id"], "active": active["id"]}


async def recorded(parts, tenant_id, kind, stream_id):
    """Return the events of a stream."""
    async with parts.database.connection() as connection:
        return [e.event for e in await store.read_stream(connection, tenant_id, kind, stream_id)]


async def types(parts, tenant_id, kind, stream_id):
    """Return the types of a stream's events."""
    return [event.TYPE for event in await recorded(parts, tenant_id, kind, stream_id)]


async def head(parts, tenant_id):
    """Return the position of the tenant's last event."""
    async with parts.database.connection() as connection:
        return await store.read_head_position(connection, tenant_id)


def refused(message):
    """Return the body of a 400, whose message begins with the name of the field at fault."""
    return {"error": message, "field": message.partition(":")[0]}


async def raw(client, method, path, **options):
    """Return (status, octets) of an answer."""
    url = f"{client.base_url}/api/v1{path}"
    async with client.session.request(method, url, headers=client.headers, **options) as response:
        octets = await response.read()
        return response.status, octets.removesuffix(b"\n") if response.content_type == "application/json" else octets


def rfc3339(moment):
    """Return a time as the API answers it."""
    return moment.isoformat().replace("+00:00", "Z")


def ago(length):
    """Return the time `length` before now, as the API answers it."""
    return rfc3339(datetime.now(UTC) - length)


async def rename(parts, tenant, service_id, name="Renamed"):
    await carry_out(parts, service.DECIDER, tenant.id, service_id, ChangeService(name=name))


async def etag(client, path):
    """Return the entity tag of the resource that a command at `path` changes."""
    return (await client.get("/".join(path.split("/")[:3])))[2]["ETag"]


async def send_command(client, method, path, body, *tags, key=None):
    """Return (status, body, headers) of the answer to a command, which requires one of `tags` if there are any."""
    headers = CIMultiDict(client.headers)
    for value in tags:
        headers.add("If-Match", value)
    if key is not None:
        headers["Idempotency-Key"] = key
    url = f"{client.base_url}/api/v1{path}"
    async with client.session.request(method, url, headers=headers, json=body) as response:
        return response.status, await response.json(), response.headers


async def read_if_none_match(client, path, *tags, method="GET"):
    """Return (status, octets, headers) of an answer to a client that holds `tags`."""
    headers = CIMultiDict(client.headers)
    for value in tags:
        headers.add("If-None-Match", value)
    async with client.session.request(method, f"{client.base_url}/api/v1{path}", headers=headers) as response:
        return response.status, await response.read(), response.headers


class KeyedAnswer(NamedTuple):
    """Hold the parts of a response that a repeat must reproduce."""

    status: int
    octets: bytes
    told: dict[str, str | None]
    replayed: str | None


async def send_keyed(client, request, key=KEY, **options):
    """Send a (method, path, body) with an idempotency key, or without one if that is None."""
    method, path, body = request
    if "data" not in options:
        options["json"] = body
    headers = {**client.headers, "Content-Type": "application/json"}
    if key is not None:
        headers["Idempotency-Key"] = key
    url = f"{client.base_url}/api/v1{path}"
    async with client.session.request(method, url, headers=headers, **options) as response:
        told = {name: response.headers.get(name) for name in REPEATED_HEADERS}
        return KeyedAnswer(response.status, await response.read(), told, response.headers.get("Idempotency-Replayed"))


def keyed_request(name, linked):
    """Return the (method, path, body) of a command on the resources of `linked`."""
    method, path, body = KEYED_REQUESTS[name]
    if name in CREATING:
        body = {**body, "service_ids": [linked["service"]]}
    return method, path.format(**linked), body


@pytest.fixture
async def operator(http, base_url, parts: Core) -> Client:
    """A client with an operator's token."""
    return Client(http, base_url, await make_operator(parts))


@pytest.fixture
async def things(api, parts: Core, acme: Tenant) -> dict[str, int]:
    """One resource of each kind, of tenant acme, with a canary in every text field."""
    words = {"title": f"{CANARY} title", "description": f"{CANARY} description"}
    service = await make_service(parts, acme.id, CANARY.lower(), name=CANARY, description=CANARY, tags=(CANARY,))
    _, incident, _ = await api.post("/incidents", {**words, "service_ids": [service], "severity": "critical"})
    await api.post(f"/incidents/{incident['id']}/updates", {"message": f"{CANARY} message"})
    await api.patch(f"/incidents/{incident['id']}", {"root_cause": CANARY, "postmortem": CANARY})
    _, window, _ = await api.post("/maintenance", {**DRILL, **words, "service_ids": [service]})
    _, subscription, _ = await api.post("/subscriptions", {**HOOK, "target": f"https://example.com/{CANARY}"})
    return {
        "services": service,
        "incidents": incident["id"],
        "maintenance": window["id"],
        "subscriptions": subscription["id"],
    }


@pytest.fixture
async def past_incident(api) -> str:
    """The path of an incident that began ten hours ago."""
    _, incident, _ = await api.post("/incidents", {"title": "A", "occurred_at": ago(10 * HOUR)})
    return f"/incidents/{incident['id']}"


@pytest.fixture
async def ids(api, parts, acme) -> dict[str, int]:
    """The ids of a service, an incident and two windows. The active window affects no service."""
    long_ago = datetime.now(UTC) - timedelta(days=100)
    service_id = await make_service(parts, acme.id, "portal", name="Portal", occurred_at=long_ago)
    words = {"title": "A", "service_ids": [service_id]}
    made = await make_resources(api, {**words, "severity": "informational"}, words, {"title": "C"})
    return {"service": service_id, **made}


@pytest.fixture
async def linked(api, parts, acme) -> dict[str, int]:
    """The ids of a service, and of an incident and two windows that affect it."""
    service_id = await make_service(parts, acme.id, "portal", name="Portal")
    words = {"title": "A", "description": "Somebody's name", "service_ids": [service_id]}
    return {"service": service_id, **await make_resources(api, words, words, words)}
