"""The contract of an event store, independent of its storage. A test class derives from it and provides fixtures.

`connect` opens a new connection of an appender; `tenant` and `neighbour` are ids of two tenants with empty ledgers.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import asyncpg
import pytest

from opsentry.domain.incident import IncidentOpened
from opsentry.events import store
from opsentry.events.codec import Actor, Meta
from opsentry.events.store import (
    Append,
    Appended,
    HeadBusy,
    IdempotencyKey,
    NewEvent,
    Replayed,
    Reserved,
    UnknownTenant,
    VersionConflict,
)
from tests.events.ledger import META, ODD_TEXTS, append, held, messages, note, notes, rows
from tests.waiting import GENEROUS_SECONDS


class StoreContract:
    async def test_positions_count_from_one_without_gaps(self, connect, tenant):
        appender = await connect()
        for texts in (["a"], ["b", "c", "d"], ["e", "f"]):
            await append(appender, notes(tenant, *texts))
        assert [row["position"] for row in await rows(appender, tenant)] == [1, 2, 3, 4, 5, 6]
        assert await store.read_head_position(appender, tenant) == 6

    async def test_the_head_of_an_empty_ledger_is_at_zero(self, connect, tenant):
        reader = await connect()
        assert await store.read_head_position(reader, tenant) == 0
        assert await store.read_after(reader, tenant, 0, 10) == []

    async def test_positions_count_within_each_tenant(self, connect, tenant, neighbour):
        appender = await connect()
        await store.append_events(appender, [notes(tenant, "a", "b"), notes(neighbour, "x")], wait=False)
        await append(appender, notes(neighbour, "y"))
        assert [row["position"] for row in await rows(appender, tenant)] == [1, 2]
        assert [row["position"] for row in await rows(appender, neighbour)] == [1, 2]

    async def test_a_rolled_back_append_gives_its_position_to_the_next_one(self, connect, tenant):
        appender = await connect()
        await append(appender, notes(tenant, "kept", stream=5))
        transaction = appender.transaction()
        await transaction.start()
        lost = await append(appender, notes(tenant, "lost", "lost", stream=5, expected=1))
        await transaction.rollback()
        following = await append(appender, notes(tenant, "next", stream=5, expected=1))
        assert isinstance(lost, Appended)
        assert isinstance(following, Appended)
        assert (lost.position, following.position, following.version) == (3, 2, 2)
        assert await messages(appender, tenant) == ["kept", "next"]

    async def test_versions_count_from_one_without_gaps_within_a_stream(self, connect, tenant):
        appender = await connect()
        for stream in (7, 8):
            await append(appender, notes(tenant, "a", "b", stream=stream))
        for stream in (8, 7):
            await append(appender, notes(tenant, "c", stream=stream, expected=2))
        for stream in (7, 8):
            recorded = await store.read_stream(appender, tenant, "incident", stream)
            assert [r.version for r in recorded] == [1, 2, 3]
            assert [r.position for r in recorded] == sorted(r.position for r in recorded)

    async def test_tenant_kind_and_id_identify_a_stream(self, connect, tenant, neighbour):
        appender = await connect()
        outcomes = await store.append_events(
            appender,
            [
                notes(tenant, "a", stream=1),
                notes(tenant, "b", stream=1, kind="service"),
                notes(neighbour, "c", stream=1),
            ],
            wait=False,
        )
        assert [o.version for o in outcomes if isinstance(o, Appended)] == [1, 1, 1]
        assert [r.version for r in await store.read_stream(appender, tenant, "incident", 1)] == [1]

    async def test_a_conflict_returns_the_actual_version_and_consumes_no_position(self, connect, tenant):
        appender = await connect()
        await append(appender, notes(tenant, "a", "b", stream=3))
        for expected in (0, 1, 3, 99):
            assert await append(appender, notes(tenant, "x", stream=3, expected=expected)) == VersionConflict(2)
        following = await append(appender, notes(tenant, "c", stream=3, expected=2))
        assert isinstance(following, Appended)
        assert (following.position, following.version) == (3, 3)

    async def test_expected_version_zero_means_that_the_stream_must_not_exist(self, connect, tenant):
        appender = await connect()
        assert isinstance(await append(appender, notes(tenant, "a", stream=3, expected=0)), Appended)
        assert await append(appender, notes(tenant, "b", stream=3, expected=0)) == VersionConflict(1)

    async def test_expecting_a_version_of_a_stream_that_does_not_exist_is_a_conflict(self, connect, tenant):
        assert await append(await connect(), notes(tenant, "a", stream=3, expected=1)) == VersionConflict(0)

    async def test_new_streams_count_from_one_per_tenant_and_kind(self, connect, tenant, neighbour):
        appender = await connect()
        for _ in range(2):
            commands = [notes(t, "a", kind=kind) for t in (tenant, neighbour) for kind in ("incident", "service")]
            await store.append_events(appender, [commands[0], *commands], wait=False)
        outcomes = await store.append_events(
            appender, [notes(t, "a", kind=k) for t in (tenant, neighbour) for k in ("incident", "service")], wait=False
        )
        assert [o.stream_id for o in outcomes if isinstance(o, Appended)] == [5, 3, 3, 3]

    async def test_a_refused_or_rolled_back_command_consumes_no_id(self, connect, tenant):
        appender = await connect()
        first = await append(appender, notes(tenant, "a", reservation="name"))
        assert isinstance(first, Appended)
        assert await append(appender, notes(tenant, "b", reservation="name")) == Reserved(first.stream_id)
        assert await append(appender, notes(tenant, "c", expected=1)) == VersionConflict(0)
        transaction = appender.transaction()
        await transaction.start()
        assert isinstance(await append(appender, notes(tenant, "d")), Appended)
        await transaction.rollback()
        following = await append(appender, notes(tenant, "e"))
        assert isinstance(following, Appended)
        assert (first.stream_id, following.stream_id) == (1, 2)

    async def test_a_command_without_events_records_its_key_and_consumes_nothing(self, connect, tenant):
        appender = await connect()
        key = IdempotencyKey(b"key", b"request")
        empty = Append(tenant_id=tenant, kind="incident", stream_id=0, expected_version=0, events=[], key=key)
        assert isinstance(await append(appender, empty), Appended)
        replayed, appended = await store.append_events(appender, [empty, notes(tenant, "a")], wait=False)
        assert isinstance(replayed, Replayed)
        assert isinstance(appended, Appended)
        assert (appended.stream_id, appended.position) == (1, 1)
        assert await store.read_head_position(appender, tenant) == 1
        backlog = await appender.fetch("SELECT position FROM projection_backlog WHERE tenant_id = $1", tenant)
        assert [row["position"] for row in backlog] == [1]

    async def test_a_new_stream_never_gets_a_used_id(self, connect, tenant):
        appender = await connect()
        for given, counted in ((1, 2), (7, 8), (3, 9)):
            assert isinstance(await append(appender, notes(tenant, "a", stream=given)), Appended)
            following = await append(appender, notes(tenant, "b"))
            assert isinstance(following, Appended)
            assert following.stream_id == counted

    async def test_concurrent_writers_leave_no_gap_in_ids(self, connect, tenant):
        writers = [await connect() for _ in range(6)]

        async def write(appender):
            return [await append(appender, notes(tenant, "a")) for _ in range(20)]

        outcomes = [o for created in await asyncio.gather(*map(write, writers)) for o in created]
        assert sorted(o.stream_id for o in outcomes if isinstance(o, Appended)) == list(range(1, 121))

    async def test_streams_with_the_same_id_in_two_tenants_stay_apart(self, connect, tenant, neighbour):
        appender = await connect()
        await store.append_events(appender, [notes(tenant, "ours"), notes(neighbour, "theirs")], wait=False)
        for owner, text in ((tenant, "ours"), (neighbour, "theirs")):
            for found in (
                await store.read_stream(appender, owner, "incident", 1),
                await store.read_streams(appender, owner, "incident", [1], 10),
                await store.read_after(appender, owner, 0, 10),
                await store.read_between(appender, owner, 0, 10, ["incident"]),
                [e async for part in store.read_by_stream(appender, owner, "incident", 10, 10) for e in part[1]],
            ):
                assert [(r.tenant_id, r.stream_id, r.event) for r in found] == [(owner, 1, note(text).event)]

    async def test_each_command_of_a_batch_has_its_own_outcome(self, connect, tenant, neighbour):
        appender = await connect()
        await append(appender, notes(tenant, "first", stream=1, reservation="name"))
        outcomes = await store.append_events(
            appender,
            [
                notes(tenant, "stale", stream=1, expected=0),
                notes(tenant, "good", stream=1, expected=1),
                notes(tenant, "stale after the one before", stream=1, expected=1),
                notes(tenant, "taken", stream=2, reservation="name"),
                notes(tenant, "good", stream=1, expected=2),
                notes(neighbour, "good", stream=1),
                notes(10**9, "nobody's"),
            ],
            wait=False,
        )
        kinds = [type(outcome) for outcome in outcomes]
        assert kinds == [VersionConflict, Appended, VersionConflict, Reserved, Appended, Appended, UnknownTenant]
        assert outcomes[:1] + outcomes[2:4] == [VersionConflict(1), VersionConflict(2), Reserved(1)]
        assert [row["position"] for row in await rows(appender, tenant)] == [1, 2, 3]
        assert await messages(appender, tenant) == ["first", "good", "good"]

    async def test_one_of_many_concurrent_writers_reserves_a_name(self, connect, tenant):
        writers = [await connect() for _ in range(8)]
        for name in ("a", "b", "c"):
            outcomes = await asyncio.gather(*(append(w, notes(tenant, "mine", reservation=name)) for w in writers))
            winners = [o.stream_id for o in outcomes if isinstance(o, Appended)]
            assert len(winners) == 1
            assert [o for o in outcomes if isinstance(o, Reserved)] == [Reserved(winners[0])] * 7
            assert await store.find_reservations(writers[0], tenant, [name, "free"]) == {name: winners[0]}
        assert [row["position"] for row in await rows(writers[0], tenant)] == [1, 2, 3]

    async def test_a_reservation_holds_in_its_tenant_only_and_not_after_a_rollback(self, connect, tenant, neighbour):
        appender = await connect()
        transaction = appender.transaction()
        await transaction.start()
        await append(appender, notes(tenant, "lost", reservation="name"))
        await transaction.rollback()
        assert isinstance(await append(appender, notes(tenant, "kept", reservation="name")), Appended)
        assert isinstance(await append(appender, notes(neighbour, "kept", reservation="name")), Appended)

    async def test_a_conflict_reserves_no_name(self, connect, tenant):
        appender = await connect()
        assert await append(
            appender, notes(tenant, "stale", stream=1, expected=4, reservation="name")
        ) == VersionConflict(0)
        assert await store.find_reservations(appender, tenant, ["name"]) == {}

    async def test_a_locked_ledger_head_delays_no_other_tenant(self, connect, tenant, neighbour):
        appender, holder = await connect(), await connect()
        async with held(holder, tenant):
            outcomes = await store.append_events(appender, [notes(tenant, "a"), notes(neighbour, "x")], wait=False)
            assert [type(outcome) for outcome in outcomes] == [HeadBusy, Appended]
            assert isinstance(await append(appender, notes(neighbour, "y")), Appended)
        assert isinstance(await append(appender, notes(tenant, "a"), wait=False), Appended)
        assert await messages(appender, tenant) == ["a"]

    async def test_an_append_that_waits_too_long_records_nothing(self, connect, tenant):
        appender, holder = await connect(), await connect()
        async with held(holder, tenant):
            with pytest.raises(asyncpg.LockNotAvailableError):
                await append(appender, notes(tenant, "too late"), wait=True)
        assert await rows(appender, tenant) == []
        following = await append(appender, notes(tenant, "in time"))
        assert isinstance(following, Appended)
        assert following.position == 1

    async def test_a_following_reader_sees_each_position_once_and_in_order(self, connect, tenant):
        writers = [await connect() for _ in range(6)]
        reader = await connect()
        seen: list[int] = []

        async def write(appender, number):
            for i in range(40):
                transaction = appender.transaction()
                await transaction.start()
                await append(appender, notes(tenant, f"{number}/{i}", "and more"))
                await (transaction.rollback if i % 4 == 3 else transaction.commit)()

        async def follow():
            while len(seen) < 6 * 30 * 2:
                after = seen[-1] if seen else 0
                seen.extend(r.position for r in await store.read_after(reader, tenant, after, 7))

        async with asyncio.timeout(GENEROUS_SECONDS):
            await asyncio.gather(follow(), *(write(w, n) for n, w in enumerate(writers)))
        assert seen == list(range(1, 361))

    async def test_recorded_at_increases_strictly_across_streams_and_writers(self, connect, tenant):
        writers = [await connect() for _ in range(4)]

        async def write(appender):
            for _ in range(10):
                await append(appender, notes(tenant, *"abcde"))

        await asyncio.gather(*map(write, writers))
        moments = [r.recorded_at for r in await store.read_after(writers[0], tenant, 0, 1000)]
        assert len(moments) == 200
        assert all(earlier < later for earlier, later in pairwise(moments))

    async def test_occurred_at_keeps_microseconds(self, connect, tenant):
        appender = await connect()
        moments = [
            datetime(2011, 3, 27, 1, 59, 59, 999_999, tzinfo=UTC),
            datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
            datetime(2096, 2, 29, 12, 0, 0, 1, tzinfo=UTC),
        ]
        command = Append(
            tenant_id=tenant,
            kind="incident",
            stream_id=1,
            expected_version=0,
            events=[*(note("then", moment) for moment in moments), note("now")],
        )
        await append(appender, command)
        *dated, undated = await store.read_after(appender, tenant, 0, 10)
        assert [r.occurred_at for r in dated] == moments
        assert undated.occurred_at == undated.recorded_at
        assert dated[0].recorded_at + timedelta(microseconds=3) == undated.recorded_at

    async def test_text_is_read_back_byte_for_byte(self, connect, tenant):
        appender = await connect()
        meta = Meta(Actor("token", 2**62), request_id=ODD_TEXTS[2], silent=True)
        for number, text in enumerate(ODD_TEXTS):
            opened = IncidentOpened(
                title=text, description=text * 2, severity=text, visibility="public", service_ids=(9, 1), source=text
            )
            command = Append(
                tenant_id=tenant,
                kind="incident",
                stream_id=number + 1,
                expected_version=0,
                events=[NewEvent(opened, meta)],
            )
            await append(appender, command)
            (recorded,) = await store.read_stream(appender, tenant, "incident", number + 1)
            assert (recorded.event, recorded.meta) == (opened, meta)

    async def test_the_outcome_describes_the_stored_events(self, connect, tenant):
        appender = await connect()
        await append(appender, notes(tenant, "before", stream=4))
        command = Append(
            tenant_id=tenant,
            kind="incident",
            stream_id=4,
            expected_version=1,
            events=[note("a"), note("b", datetime(2020, 1, 1, tzinfo=UTC)), NewEvent(note("c").event, META)],
        )
        appended = await append(appender, command)
        assert isinstance(appended, Appended)
        assert appended.record(command) == await store.read_after(appender, tenant, 1, 10)
        assert appended.record(command) == await store.read_stream(appender, tenant, "incident", 4, after=1)
