"""Write to tenants and read them continuously; compare each response with everything that it may show.

A mark on every row of a tenant tells old rows from replayed ones. A response shows either all marked rows with their
mark, or no mark at all. A mixture is a rebuild that became visible half done.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import count
from typing import Any, Self

import aiohttp

from opsentry.bootstrap import Core
from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.events import AnyEvent
from opsentry.domain.incident import IncidentOpened, IncidentUpdated
from opsentry.domain.maintenance import StartMaintenance
from opsentry.domain.subscription import CreateSubscription
from opsentry.events import store
from opsentry.events.store import Append, NewEvent
from tests import commands
from tests.conftest import META, Client, Tenant, make_service
from tests.projections.histories import schedule
from tests.waiting import GENEROUS_SECONDS

OLD = "old "
MESSAGES = 12
# Seconds between requests of a client: the machine has few cores, and a rebuild replays everything that is written.
WRITING_PACE, READING_PACE, LOOKING_PACE = 0.1, 0.06, 0.1

# Blocks every projector of the tenant while the transaction lasts.
_STOP = "SELECT FROM checkpoints WHERE tenant_id = $1 ORDER BY projection FOR NO KEY UPDATE"

# The texts of its incidents.
_TEXTS = """
SELECT body::json ->> 'title' AS text FROM incidents WHERE tenant_id = $1
UNION ALL SELECT body::json ->> 'message' FROM incident_updates WHERE tenant_id = $1
"""

# Marks every row of a tenant as old. As after a rebuild, a projector that has read rows before writes nothing.
_MARK = (
    "UPDATE checkpoints SET rebuilt_at = clock_timestamp() WHERE tenant_id = $1",
    """UPDATE incidents SET body = replace(body, '"title":"', '"title":"old ') WHERE tenant_id = $1""",
    """UPDATE incident_snapshots SET body = replace(body, '"title":"', '"title":"old ') WHERE tenant_id = $1""",
    """UPDATE incident_updates SET body = replace(body, '"message":"', '"message":"old ') WHERE tenant_id = $1""",
    """UPDATE maintenance SET body = replace(body, '"title":"', '"title":"old ') WHERE tenant_id = $1""",
    """UPDATE services SET body = replace(body, '"name":"', '"name":"old ') WHERE tenant_id = $1""",
    """UPDATE services SET link = replace(link, '"name":"', '"name":"old ') WHERE tenant_id = $1""",
    "UPDATE service_impacts SET level = 4 WHERE tenant_id = $1",
    "UPDATE outbox_state SET state = state || ' ' WHERE tenant_id = $1",
)

_unique = count(1)


class Watched:
    """A tenant with every title and message that was requested and acknowledged.

    Titles and messages are unique. No client changes the incident `quiet`; clients change `others`.
    """

    def __init__(self, tenant: Tenant, loud: int, silenced: int) -> None:
        self.tenant = tenant
        self.loud, self.silenced = loud, silenced
        self.quiet = 0
        self.others: list[int] = []
        self.incidents: dict[int, str] = {}
        self.asked: set[str] = set()
        self.answered: set[str] = set()
        self.messages: dict[int, list[str]] = {}
        self.posted: dict[int, list[str]] = {}
        self.resolving: set[str] = set()
        self.resolved: set[str] = set()
        self.marked: set[str] = set()
        self.marking = 0
        self.seen: set[bool] = set()

    async def mark(self, owner: Any) -> None:
        """Mark all present rows as old."""
        async with owner.transaction():
            await owner.execute(_STOP, self.tenant.id)
            self.marked = {row["text"] for row in await owner.fetch(_TEXTS, self.tenant.id)}
            for statement in _MARK:
                await owner.execute(statement, self.tenant.id)
        self.seen = set()
        self.marking += 1

    def mixed(self, texts: Iterable[str], *, old: bool) -> list[str]:
        """Return the texts that do not fit a response of only old rows, or of only new ones."""
        found = []
        for text in texts:
            bare = text.removeprefix(OLD)
            if (text != bare) != (old and bare in self.marked):
                found.append(text)
        return found


async def watched(parts: Core, tenant: Tenant, incidents: int) -> Watched:
    """Fill a tenant's ledger with `incidents` incidents of a dozen messages each, subscriptions and a window."""
    made = Watched(tenant, *[await make_service(parts, tenant.id, slug) for slug in ("loud", "silenced")])
    for subscriber_filter in (
        CreateSubscription(channel="webhook", target="x", audience="internal"),
        CreateSubscription(channel="email", target="x", min_severity="critical"),
        CreateSubscription(channel="slack", target="x", notify_maintenance=False, service_ids=(made.loud,)),
    ):
        await commands.create(parts, subscription.DECIDER, tenant.id, subscriber_filter, META)
    # This window suppresses notifications, so that few deliveries stay pending.
    window = schedule(service_ids=(made.silenced,), suppress_alerts=True, auto_complete=False)
    planned = await commands.create(parts, maintenance.DECIDER, tenant.id, window, META)
    await commands.change(parts, maintenance.DECIDER, tenant.id, planned.stream_id, StartMaintenance(), META)
    for number in range(incidents):
        # Readiness counts pending intents, and no sender runs: the window suppresses most of them.
        service_id = made.silenced if number else made.loud
        title = f"incident {next(_unique)}"
        texts = [f"message {next(_unique)}" for _ in range(100 if number == 1 else MESSAGES)]
        events: list[AnyEvent] = [
            IncidentOpened(title=title, severity="degraded", visibility="public", service_ids=(service_id,))
        ]
        events += [IncidentUpdated(message=text, status="investigating") for text in texts]
        async with parts.database.connection(10) as connection:
            append = Append(
                tenant_id=tenant.id,
                kind=incident.KIND,
                stream_id=0,
                expected_version=0,
                events=[NewEvent(event, META) for event in events],
            )
            (appended,) = await store.append_events(connection, [append], wait=True)
        assert isinstance(appended, store.Appended)
        if number:
            made.others.append(appended.stream_id)
        else:
            made.quiet = appended.stream_id
        made.incidents[appended.stream_id] = title
        made.asked.add(title)
        made.answered.add(title)
        made.messages[appended.stream_id] = texts
        made.posted[appended.stream_id] = list(texts)
    await parts.projector.catch_up(tenant.id, 0)
    return made


class Watch:
    """Run writers, readers and a probe until the end; `wrong` lists every wrong response."""

    def __init__(self, base_url: str, tenants: Sequence[Watched]) -> None:
        self.wrong: list[str] = []
        self.written = 0
        self.read = 0
        self.lagging = 0
        self.probed = 0
        self._base_url = base_url
        self._tenants = tenants
        self._stopping = asyncio.Event()
        self._seen = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        self._chance = random.Random(1)

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=GENEROUS_SECONDS)
        )
        steps: list[tuple[Callable[[], Awaitable[None]], float]] = [(self._probe, LOOKING_PACE)]
        for one in self._tenants:
            client = Client(self._session, self._base_url, one.tenant.token)
            steps.append((self._appender(client, one), WRITING_PACE))
            steps.append((self._reader(client, one), READING_PACE))
        self._tasks = [asyncio.create_task(self._again_and_again(step, pace)) for step, pace in steps]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        try:
            await asyncio.gather(*self._tasks)
        finally:
            assert self._session is not None
            await self._session.close()

    async def shown(self, *, old: bool) -> None:
        """Wait until a read of every tenant has shown only old rows, or only new ones."""
        async with asyncio.timeout(GENEROUS_SECONDS), self._seen:
            await self._seen.wait_for(lambda: self.wrong or all(old in one.seen for one in self._tenants))

    async def _again_and_again(self, step: Callable[[], Awaitable[None]], pace: float) -> None:
        try:
            while not self._stopping.is_set():
                await step()
                await asyncio.sleep(pace)
        except Exception as error:  # noqa: BLE001 - the test looks at `wrong` before it awaits this task
            await self._tell(f"{type(error).__name__}: {error}")

    async def _tell(self, problem: str) -> None:
        async with self._seen:
            self.wrong.append(problem)
            self._seen.notify_all()

    async def _probe(self) -> None:
        assert self._session is not None
        async with self._session.get(f"{self._base_url}/health/ready") as response:
            self.probed += 1
            if response.status != 200:
                await self._tell(f"readiness: {response.status} {await response.text()}")

    # -------------------------------------------------------------------------------------------- writing

    def _appender(self, client: Client, one: Watched) -> Callable[[], Awaitable[None]]:
        turns = count()
        own = 0

        async def write() -> None:
            nonlocal own
            turn = next(turns)
            if turn % 16 == 0:
                own = await self._open(client, one, one.silenced if turn % 800 else one.loud)
            elif turn % 16 == 15:
                title = one.incidents[own]
                one.resolving.add(title)
                await self._post(client, f"/incidents/{own}/resolve", {}, 200)
                one.resolved.add(title)
            else:
                await self._update(client, one, own if turn % 3 else self._chance.choice(one.others))

        return write

    async def _open(self, client: Client, one: Watched, service_id: int) -> int:
        title = f"incident {next(_unique)}"
        one.asked.add(title)
        body = await self._post(client, "/incidents", {"title": title, "service_ids": [service_id]}, 201)
        number = int(body["id"])
        one.messages[number], one.posted[number] = [], []
        one.incidents[number] = title
        one.answered.add(title)
        return number

    async def _update(self, client: Client, one: Watched, number: int) -> None:
        message = f"message {next(_unique)}"
        one.messages[number].append(message)
        await self._post(client, f"/incidents/{number}/updates", {"message": message}, 201)
        one.posted[number].append(message)

    async def _post(self, client: Client, path: str, body: Any, expected: int) -> Any:
        status, answer, _ = await client.post(path, body)
        self.written += 1
        if status != expected:
            raise AssertionError(f"POST {path}: {status} {answer}")
        return answer

    # -------------------------------------------------------------------------------------------- reading

    def _reader(self, client: Client, one: Watched) -> Callable[[], Awaitable[None]]:
        turns = count()
        checks = (self._list, self._active, self._detail, self._services)

        async def read() -> None:
            began, turned = one.marking, False in one.seen
            old = await checks[next(turns) % len(checks)](client, one)
            self.read += 1
            if began != one.marking or old is None:
                return
            if old and turned:
                await self._tell(f"{one.tenant.slug}: old rows after new ones")
            async with self._seen:
                one.seen.add(old)
                self._seen.notify_all()

        return read

    async def _get(self, client: Client, path: str) -> tuple[Any, bool]:
        """Return a response body, and whether its header says that it lags."""
        status, body, headers = await client.get(path)
        if status != 200:
            raise AssertionError(f"GET {path}: {status} {body}")
        self.lagging += "Opsentry-Lag-Events" in headers
        return body, "Opsentry-Lag-Events" in headers

    async def _compare(
        self, name: str, one: Watched, texts: Sequence[str], required: Iterable[str], allowed: Iterable[str]
    ) -> bool | None:
        """Compare the texts with those required and allowed; return whether they are old, `None` if unknown."""
        bare = [text.removeprefix(OLD) for text in texts]
        old = any(text.startswith(OLD) for text in texts)
        problems = {
            "twice": [text for text, times in Counter(bare).items() if times > 1],
            "mixed": one.mixed(texts, old=old),
            "missing": sorted(set(required) - set(bare)),
            "unknown": sorted(set(bare) - set(allowed)),
        }
        if found := {problem: texts for problem, texts in problems.items() if texts}:
            await self._tell(f"{one.tenant.slug} {name}: {found}, old={old}")
        return old if one.marked & set(bare) else None

    async def _list(self, client: Client, one: Watched) -> bool | None:
        before = set(one.answered)
        body, lags = await self._get(client, "/incidents?limit=200")
        titles = [item["title"] for item in body["incidents"]]
        if not (0 if lags else len(before)) <= body["total"] <= len(one.asked):
            await self._tell(f"{one.tenant.slug}: a total of {body['total']}, not {len(before)} to {len(one.asked)}")
        if body["total"] != len(titles):
            await self._tell(f"{one.tenant.slug}: a total of {body['total']}, and {len(titles)} incidents")
        old = await self._compare("list", one, titles, () if lags else before, one.asked)
        await self._compare_links(one, body["incidents"], old=old)
        return old

    async def _active(self, client: Client, one: Watched) -> bool | None:
        before, over = set(one.answered), set(one.resolved)
        body, lags = await self._get(client, "/incidents/active")
        titles = [item["title"] for item in body["incidents"]]
        required = () if lags else before - one.resolving
        old = await self._compare("active", one, titles, required, one.asked if lags else one.asked - over)
        await self._compare_links(one, body["incidents"], old=old)
        return old

    async def _detail(self, client: Client, one: Watched) -> bool | None:
        number = self._chance.choice(list(one.incidents))
        before = set(one.posted[number])
        body, lags = await self._get(client, f"/incidents/{number}")
        messages = [entry["message"] for entry in body["updates"]]
        bare = [text.removeprefix(OLD) for text in messages]
        # One client writes them in sequence.
        if bare != one.messages[number][: len(bare)]:
            await self._tell(f"{one.tenant.slug}: messages of {number} in another order: {bare}")
        texts = [body["title"], *messages]
        title = one.incidents[number]
        required = {title} | (set() if lags else before)
        old = await self._compare(f"incident {number}", one, texts, required, {title, *one.messages[number]})
        await self._compare_links(one, [body], old=old)
        return old

    async def _services(self, client: Client, one: Watched) -> bool | None:
        body, _ = await self._get(client, "/services")
        names = [(item["name"], item["current_status"]) for item in body["services"]]
        whole = [
            [("loud", "degraded_performance"), ("silenced", "degraded_performance")],
            [("old loud", "major_outage"), ("old silenced", "major_outage")],
        ]
        if names not in whole:
            await self._tell(f"{one.tenant.slug}: services {names}")
        return names == whole[1]

    async def _compare_links(self, one: Watched, items: Sequence[Any], *, old: bool | None) -> None:
        """Check that the service names are as old as the rest of the response."""
        named = {service["name"].startswith(OLD) for item in items for service in item["services"]}
        if old is not None and named != {old}:
            await self._tell(f"{one.tenant.slug}: old links: {named}, old response: {old}")
