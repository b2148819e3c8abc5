"""Random commands on several tenants; afterwards every answer that was ever given is asked for again."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from itertools import count
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from opsentry.bootstrap import Core, core, serving
from opsentry.domain import incident, service
from opsentry.domain.decider import REDACTED
from opsentry.domain.events import EVENT_TYPES
from opsentry.domain.service import ChangeService, RetireService
from opsentry.domain.visibility import VISIBILITIES
from opsentry.events.verification import verify
from opsentry.settings import Settings
from tests import commands
from tests.conftest import META, Tenant, make_service, make_tenant

_numbers = count(1)
TENANTS = st.integers(0, 1)
SEVERITY = st.sampled_from(incident.SEVERITIES)
STATUS = st.sampled_from(incident.STATUSES)
VISIBILITY = st.sampled_from(VISIBILITIES)
LISTS = (
    "/incidents",
    "/incidents?limit=2&offset=1",
    "/incidents?status=investigating&severity=degraded",
    "/incidents/active",
    "/services",
    "/services?status=major_outage",
    "/maintenance",
    "/maintenance?status=active",
)


class Answer(NamedTuple):
    """What a read was answered at a moment."""

    path: str
    position: int
    body: bytes


class Sent(NamedTuple):
    """A command that was sent under a key."""

    method: str
    path: str
    body: Any
    key: str
    status: int
    answer: bytes
    position: int


class World:
    """The API, served by a loop in a thread of its own, and what it works with."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.parts: Core
        self.url: str
        self.http: aiohttp.ClientSession
        self.run(self._open())

    async def _open(self) -> None:
        self.parts = await self._stack.enter_async_context(core(self.settings))
        self.url = await self._stack.enter_async_context(serving(self.settings, self.parts))
        self.http = await self._stack.enter_async_context(aiohttp.ClientSession())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def close(self) -> None:
        self.run(self._stack.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Side:
    """One tenant, all that was said to it, and all that it answered."""

    def __init__(self, world: World, tenant: Tenant, services: list[int]) -> None:
        self.world = world
        self.tenant = tenant
        self.services = services
        self.incidents: list[int] = []
        self.windows: list[int] = []
        self.answers: list[Answer] = []
        self.sent: list[Sent] = []
        self.downtime: list[tuple[int, set[bytes]]] = []
        self.foreign = b"-"

    def word(self) -> str:
        """A text that was never written before, and that tells whose it is."""
        return f'{self.tenant.slug} {next(_numbers)} "ü'

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, Any]:
        async def send() -> tuple[int, bytes, Any]:
            headers["Authorization"] = f"Bearer {self.tenant.token}"
            options = {} if body is None else {"json": body}
            url = f"{self.world.url}/api/v1{path}"
            async with self.world.http.request(method, url, headers=headers, **options) as response:
                return response.status, await response.read(), response.headers

        status, octets, found = self.world.run(send())
        assert status < 500, (status, octets)
        assert self.foreign not in octets
        return status, octets, found

    def command(self, method: str, path: str, body: Any = None, *, draw: Callable[..., Any]) -> tuple[int, Any]:
        """Send a command, under a key or not, and look at some of what it may have changed."""
        key = draw(st.none() | st.just(f"key {next(_numbers)}"))
        status, octets, headers = self.ask(method, path, body, **({"Idempotency-Key": key} if key else {}))
        if key is not None and status < 300:
            self.sent.append(Sent(method, path, body, key, status, octets, int(headers["Opsentry-Position"])))
        answer = json.loads(octets)
        things = [f"/incidents/{i}" for i in self.incidents] + [f"/maintenance/{i}" for i in self.windows]
        things += [f"/services/{i}" for i in self.services]
        for seen in draw(st.lists(st.sampled_from([*LISTS, *things]), max_size=4, unique=True)):
            self.look(seen)
        return status, answer

    def look(self, path: str) -> None:
        status, octets, headers = self.ask("GET", path)
        if status == 200:
            self.answers.append(Answer(path, int(headers["Opsentry-Position"]), octets))

    def as_erased(self, octets: bytes, position: int) -> bytes:
        """What was answered at `position`, without the words that were erased since."""
        for erased_at, words in self.downtime:
            if position < erased_at:
                for word in words:
                    octets = octets.replace(word, msgspec.json.encode(REDACTED))
        return octets

    def words_of(self, kind: str, number: int) -> dict[int, dict[str, Any]]:
        _, octets, _ = self.ask("GET", f"/{kind}/{number}/events?limit=1000")
        return {event["position"]: event["data"] for event in json.loads(octets)["events"]}


class TimeTravel(RuleBasedStateMachine):
    """What two tenants do at the same time."""

    world: World

    @initialize()
    def begin(self) -> None:
        self.sides = []
        for _ in range(2):
            slug = f"canary-{next(_numbers)}-x"
            tenant = self.world.run(make_tenant(self.world.parts, slug))
            services = [
                self.world.run(make_service(self.world.parts, tenant.id, f"s{n}", name=f"{slug} service {n}"))
                for n in range(2)
            ]
            self.sides.append(Side(self.world, tenant, services))
        for side, other in zip(self.sides, reversed(self.sides), strict=True):
            side.foreign = other.tenant.slug.encode()

    def side(self, number: int, data: Any) -> tuple[Side, Callable[..., Any]]:
        return self.sides[number], data.draw

    @rule(number=TENANTS, data=st.data(), severity=SEVERITY, visibility=VISIBILITY, described=st.booleans())
    def declare(self, number: int, data: Any, severity: str, visibility: str, *, described: bool) -> None:
        side, draw = self.side(number, data)
        body = {"title": side.word(), "severity": severity, "visibility": visibility}
        body |= {"description": side.word()} if described else {}
        body |= {"service_ids": draw(st.lists(st.sampled_from(side.services), unique=True))} if side.services else {}
        body |= {"occurred_at": "2026-01-01T00:00:00+02:00"} if draw(st.booleans()) else {}
        status, answer = side.command("POST", "/incidents", body, draw=draw)
        assert status == 201
        side.incidents.append(answer["id"])

    def pick(self, side: Side, draw: Callable[..., Any]) -> int:
        """One of the tenant's incidents, or one of the other's, which it must not find."""
        others = [number for other in self.sides for number in other.incidents if other is not side]
        return int(draw(st.sampled_from([*side.incidents, *others[:1]] or [987654])))

    @rule(number=TENANTS, data=st.data(), status=st.none() | STATUS)
    def tell(self, number: int, data: Any, status: str | None) -> None:
        side, draw = self.side(number, data)
        chosen = self.pick(side, draw)
        body = {"message": side.word()} | ({"status": status} if status else {})
        code, _ = side.command("POST", f"/incidents/{chosen}/updates", body, draw=draw)
        assert code in ({201, 409} if chosen in side.incidents else {404})

    @rule(number=TENANTS, data=st.data(), severity=SEVERITY, status=STATUS, edit=st.integers(0, 15))
    def change(self, number: int, data: Any, severity: str, status: str, edit: int) -> None:
        side, draw = self.side(number, data)
        chosen = self.pick(side, draw)
        body: dict[str, Any] = {"severity": severity} if edit & 1 else {}
        body |= {"status": status} if edit & 2 else {}
        body |= {"title": side.word(), "description": side.word()} if edit & 4 else {}
        body |= {"service_ids": side.services[:1], "visibility": "internal"} if edit & 8 else {}
        code, _ = side.command("PATCH", f"/incidents/{chosen}", body, draw=draw)
        assert code in ({200, 409} if chosen in side.incidents else {404})

    @rule(number=TENANTS, data=st.data())
    def resolve(self, number: int, data: Any) -> None:
        side, draw = self.side(number, data)
        chosen = self.pick(side, draw)
        body = {"root_cause": side.word(), "postmortem": side.word()}
        code, _ = side.command("POST", f"/incidents/{chosen}/resolve", body, draw=draw)
        assert code in ({200, 409} if chosen in side.incidents else {404})

    @rule(number=TENANTS, data=st.data())
    def schedule(self, number: int, data: Any) -> None:
        side, draw = self.side(number, data)
        body = {
            "title": side.word(),
            "scheduled_start": "2036-06-01T02:00:00Z",
            "scheduled_end": "2036-06-01T04:00:00Z",
            "service_ids": side.services[:1],
        }
        code, answer = side.command("POST", "/maintenance", body, draw=draw)
        assert code == 201
        side.windows.append(answer["id"])

    @precondition(lambda self: any(side.windows for side in self.sides))
    @rule(number=TENANTS, data=st.data(), action=st.sampled_from(["start", "complete", "cancel"]))
    def act(self, number: int, data: Any, action: str) -> None:
        side, draw = self.side(number, data)
        if side.windows:
            chosen = draw(st.sampled_from(side.windows))
            code, _ = side.command("POST", f"/maintenance/{chosen}/{action}", draw=draw)
            assert code in {200, 409}

    @rule(number=TENANTS, data=st.data(), retire=st.integers(0, 3))
    def rename_or_retire(self, number: int, data: Any, retire: int) -> None:
        side, draw = self.side(number, data)
        if side.services:
            chosen = draw(st.sampled_from(side.services))
            command = RetireService() if retire == 0 else ChangeService(name=side.word())
            done = commands.change(self.world.parts, service.DECIDER, side.tenant.id, chosen, command, META)
            self.world.run(self.world.parts.projector.catch_up(side.tenant.id, self.world.run(done).position))
            if retire == 0:
                side.services.remove(chosen)

    @precondition(lambda self: any(side.incidents for side in self.sides))
    @rule(number=TENANTS, data=st.data(), what=st.sampled_from(["description", "root_cause", "update"]))
    def redact(self, number: int, data: Any, what: str) -> None:
        side, draw = self.side(number, data)
        if not side.incidents:
            return
        chosen = draw(st.sampled_from(side.incidents))
        before = side.words_of("incidents", chosen)
        messages = [position for position, words in before.items() if "message" in words]
        body: dict[str, Any] = {"fields": [what], "reason": side.word()}
        if what == "update":
            if not messages:
                return
            body = {"events": [draw(st.sampled_from(messages))], "reason": side.word()}
        status, octets, headers = side.ask("POST", f"/incidents/{chosen}/redactions", body)
        assert status == 201, octets
        after = side.words_of("incidents", chosen)
        gone = {
            msgspec.json.encode(text)
            for position, words in before.items()
            for name, text in words.items()
            if after[position][name] == REDACTED and text != REDACTED
        }
        if gone:
            first = min(position for position in after if position not in before)
            side.downtime.append((first, gone))
            assert int(headers["Opsentry-Position"]) >= first

    @precondition(lambda self: any(side.sent for side in self.sides))
    @rule(number=TENANTS, data=st.data())
    def send_again(self, number: int, data: Any) -> None:
        side, draw = self.side(number, data)
        if not side.sent:
            return
        sent = draw(st.sampled_from(side.sent))
        status, octets, headers = side.ask(sent.method, sent.path, sent.body, **{"Idempotency-Key": sent.key})
        assert (status, headers["Idempotency-Replayed"], headers["Opsentry-Position"]) == (
            sent.status,
            "true",
            str(sent.position),
        )
        assert octets == side.as_erased(sent.answer, sent.position)

    def teardown(self) -> None:
        for side in getattr(self, "sides", []):
            for answer in side.answers:
                joint = "&" if "?" in answer.path else "?"
                status, octets, _ = side.ask("GET", f"{answer.path}{joint}as_of={answer.position}")
                assert (status, octets) == (200, side.as_erased(answer.body, answer.position)), answer
            for number in side.incidents:
                check_fold(side, number)
            (verdict,) = self.world.run(verify(self.world.settings.database_url, tenant_id=side.tenant.id, jobs=1))
            assert verdict.violation is None


def check_fold(side: Side, number: int) -> None:
    """The events of an incident, as its history tells them, fold to it."""
    _, octets, _ = side.ask("GET", f"/incidents/{number}/events?limit=1000")
    history = json.loads(octets)["events"]
    assert [event["version"] for event in history] == list(range(1, len(history) + 1))
    state = incident.DECIDER.fold(msgspec.convert(event["data"], EVENT_TYPES[event["type"]]) for event in history)  # type: ignore[misc]
    shown = json.loads(side.ask("GET", f"/incidents/{number}")[1])
    for name in ("title", "description", "status", "severity", "visibility", "root_cause", "postmortem"):
        assert getattr(state, name) == shown[name]
    assert state is not None
    assert list(state.service_ids) == shown["service_ids"]


def travel(settings: Settings, examples: int, steps: int) -> None:
    world = World(settings)
    machine = type("Machine", (TimeTravel,), {"world": world})
    try:
        run_state_machine_as_test(
            machine,
            settings=hypothesis_settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        world.close()


def test_every_answer_can_be_had_again(settings):
    travel(settings, 12, 25)


@pytest.mark.faults
def test_every_answer_can_be_had_again_at_length(settings):
    travel(settings, 250, 50)
