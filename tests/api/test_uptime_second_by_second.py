"""Uptime of whatever may happen, against a walk through every second that knows nothing but the ledger's lines."""

from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from opsentry.domain import incident, maintenance
from opsentry.domain.decider import DomainError
from opsentry.domain.incident import ChangeIncident, OpenIncident, PostUpdate, ResolveIncident
from opsentry.domain.maintenance import CancelMaintenance, CompleteMaintenance, ScheduleMaintenance, StartMaintenance
from tests import commands
from tests.conftest import META, Client, make_service, make_tenant

SPAN = 90
numbers = count(1)
# Half a minute before midnight of a leap day, and before the clocks of Berlin go forward, and back.
NIGHTS = (
    datetime(2024, 2, 29, 23, 59, 30, tzinfo=UTC),
    *(datetime(2025, m, d, 0, 59, 30, tzinfo=UTC) for m, d in ((3, 30), (10, 26))),
)
RANKS = ("informational", "degraded", "partial_outage", "major_outage", "critical")
TENTHS = {"partial_outage": 3, "major_outage": 10, "critical": 10}

seconds = st.integers(0, SPAN)
severities = st.sampled_from(RANKS)
# Which of two services, by their place.
touched = st.sampled_from([(0,), (1,), (0, 1), ()])
incident_changes = st.one_of(
    st.tuples(st.just("severity"), severities),
    st.tuples(st.just("services"), touched),
    st.tuples(st.just("status"), st.sampled_from(incident.STATUSES)),
    st.tuples(st.just("update"), st.none() | st.sampled_from(incident.STATUSES)),
    st.tuples(st.just("resolve"), st.none()),
)
incidents = st.tuples(severities, touched, st.lists(st.tuples(seconds, incident_changes), min_size=1, max_size=7))
moves = st.sampled_from([StartMaintenance(), StartMaintenance(), CompleteMaintenance(), CancelMaintenance()])
windows = st.tuples(st.booleans(), touched, st.lists(st.tuples(seconds, moves), max_size=3))
# The seconds at which two services began, and their events in any order of recording. An event may have occurred before
# those recorded earlier, even before its service began.
histories = st.tuples(
    st.tuples(*[st.sampled_from([-30, 0, 20, 80])] * 2),
    st.lists(st.tuples(st.integers(-20, SPAN), incidents | windows), min_size=1, max_size=6),
)
# Where a window begins and how long it is, and the offsets in which they are written.
asked = st.tuples(st.integers(-30, SPAN), st.integers(1, SPAN), *[st.sampled_from([0, 1, 2, -3.5, 14])] * 2)


def command_of(change: tuple[str, Any], services: list[int]) -> Any:
    match change:
        case ("severity", severity):
            return ChangeIncident(severity=severity)
        case ("services", places):
            return ChangeIncident(service_ids=tuple(services[place] for place in places))
        case ("status", status):
            return ChangeIncident(status=status)
        case ("update", status):
            return PostUpdate(message="m", status=status)
        case _:
            return ResolveIncident()


async def live(parts, tenant_id, decider, begin, opening, steps):
    """Bring a stream into the world and take it through `steps`, (moment, command), in the order of their times."""
    made = await commands.create(parts, decider, tenant_id, opening, META, occurred_at=begin)
    for moment, command in sorted(steps, key=lambda step: step[0]):
        with suppress(DomainError):
            await commands.change(
                parts, decider, tenant_id, made.stream_id, command, META, occurred_at=max(begin, moment)
            )


def touching(ledger, service_id, moment):
    """(kind, id, severity, excluded, since) of all that touches a service at a moment, from lines of the ledger."""
    sources: dict[tuple[str, int], dict[str, Any]] = {}
    for line in ledger:
        kind, type_, data = line["stream_kind"], line["type"], line["data"]
        if kind not in {"incident", "maintenance"} or line["at"] > moment:
            continue
        source = sources.setdefault((kind, line["stream_id"]), {"live": False, "services": (), "as": None})
        if type_ == "incident.opened":
            source |= {"live": True, "services": data["service_ids"], "severity": data["severity"], "excluded": False}
        elif type_ == "maintenance.scheduled":
            source |= {"services": data["service_ids"], "severity": None, "excluded": data["exclude_from_sla"]}
        elif type_ in {"incident.reopened", "maintenance.started"}:
            source["live"] = True
        elif type_ in {"incident.resolved", "maintenance.completed"}:
            source["live"] = False
        elif type_ == "incident.severity_changed":
            source["severity"] = data["severity"]
        elif type_ == "incident.services_changed":
            source["services"] = data["service_ids"]
        now = (source["severity"], source["excluded"]) if source["live"] and service_id in source["services"] else None
        if now != source["as"]:
            source |= {"as": now, "since": line["at"]}
    return [(*key, *source["as"], source["since"]) for key, source in sources.items() if source["as"]]


def walk(ledger, service_id, start, end):
    """Go from `start` to `end`; return what each second came to, as Counters of seconds and tenths of them."""
    (since,) = [e["at"] for e in ledger if e["type"] == "service.registered" and e["stream_id"] == service_id]
    total: Counter[str] = Counter()
    inside: Counter[Any] = Counter()
    cut: Counter[Any] = Counter()
    counted: Counter[Any] = Counter()
    for second in range((end - start) // timedelta(seconds=1)):
        moment = start + timedelta(seconds=second)
        if moment < since:
            continue
        here = touching(ledger, service_id, moment)
        inside.update(here)
        if any(excluded for *_, excluded, _ in here):
            total["excluded"] += 1
            cut.update(here)
            continue
        total["observed"] += 1
        if here:
            first = min(here, key=lambda t: (-RANKS.index(t[2] or RANKS[0]), t[4], t[0], t[1]))
            counted[first] += 1
            total["tenths"] += TENTHS.get(first[2], 0)
    return total, inside, cut, counted


def percent(observed, tenths):
    """Two decimals, never rounded up."""
    return None if not observed else 10_000 * (10 * observed - tenths) // (10 * observed) / 100


def moment_of(text):
    return datetime.fromisoformat(text)


async def lines_of(api):
    lines: list[Any] = []
    while True:
        _, page, _ = await api.get(f"/events?limit=1000&after={len(lines)}")
        lines += [line | {"at": moment_of(line["occurred_at"])} for line in page["events"]]
        if len(page["events"]) < page["limit"]:
            return lines


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(night=st.sampled_from(NIGHTS), history=histories, window=asked)
async def test_uptime_is_what_every_second_adds_up_to(parts, http, base_url, night, history, window):
    tenant = await make_tenant(parts, f"t{next(numbers)}")

    def at(second):
        return night + timedelta(seconds=second)

    begun, happened = history
    services = [
        await make_service(parts, tenant.id, slug, occurred_at=at(second))
        for slug, second in zip("ab", begun, strict=True)
    ]
    for begin, (nature, places, changes) in happened:
        ids = tuple(services[place] for place in places)
        decider: Any
        opening: Any
        if isinstance(nature, str):
            decider, opening = incident.DECIDER, OpenIncident(title="i", severity=nature, service_ids=ids)
            steps = [(at(second), command_of(change, services)) for second, change in changes]
        else:
            # The schedule makes no difference: the actual start and end count.
            planned: Any = {"scheduled_start": at(begin), "scheduled_end": at(begin + 5)}
            decider = maintenance.DECIDER
            opening = ScheduleMaintenance(title="w", service_ids=ids, exclude_from_sla=nature, **planned)
            steps = [(at(second), move) for second, move in changes]
        await live(parts, tenant.id, decider, at(begin), opening, steps)

    await parts.projector.catch_up(tenant.id, 0)
    api = Client(http, base_url, tenant.token)
    ledger = await lines_of(api)
    first, length, *offsets = window
    start, end = at(first), at(first + length)
    query = f"from={written(start, offsets[0])}&to={written(end, offsets[1])}"
    together: Counter[str] = Counter()
    each = []
    for service_id in services:
        total, inside, cut, counted = walk(ledger, service_id, start, end)
        together += total
        totals = {
            "uptime": percent(total["observed"], total["tenths"]),
            "observed_seconds": total["observed"],
            "downtime_seconds": pytest.approx(total["tenths"] / 10),
        }
        each.append(totals)
        _, plain, _ = await api.get(f"/services/{service_id}/uptime?{query}")
        assert (moment_of(plain.pop("from")), moment_of(plain.pop("to"))) == (start, end)
        assert plain == {"service_id": service_id, **totals}
        _, body, headers = await api.get(f"/services/{service_id}/uptime?{query}&explain=true")
        assert {name: body[name] for name in plain} == plain
        assert body["excluded_seconds"] == total["excluded"]
        assert body["position"] == int(headers["Opsentry-Position"]) == ledger[-1]["position"]
        shown = {
            (p["source"]["kind"], p["source"]["id"], p["level"], p["excluded"], moment_of(p["from"])): p
            for p in body["periods"]
        }
        assert len(shown) == len(body["periods"])
        assert {key: p["seconds"] for key, p in shown.items()} == inside
        assert {key: p["excluded_seconds"] for key, p in shown.items() if p["excluded_seconds"]} == {
            key: length for key, length in cut.items() if not key[3]
        }
        assert {key: p["effective_seconds"] for key, p in shown.items() if p["effective_seconds"]} == counted
        for (_, _, level, *_), p in shown.items():
            assert p["weight"] == TENTHS.get(level, 0) / 10
            assert p["downtime_seconds"] == pytest.approx(p["effective_seconds"] * p["weight"])
        assert sum(p["downtime_seconds"] for p in body["periods"]) == totals["downtime_seconds"]
    _, body, _ = await api.get(f"/uptime?{query}")
    assert [{name: s[name] for name in each[0]} for s in body["services"]] == each
    assert body["uptime"] == percent(together["observed"], together["tenths"])
    assert body["observed_seconds"] == together["observed"]


def written(moment, hours):
    """A moment as it is written somewhere on earth."""
    return moment.astimezone(timezone(timedelta(hours=hours))).isoformat().replace("+", "%2B")
