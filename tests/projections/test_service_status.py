from itertools import product

from opsentry.domain.uptime import LEVELS, service_status


async def test_the_view_and_the_domain_derive_the_same_status(owner):
    cases = [(level, active) for level, active in product([None, *LEVELS.values()], [False, True])]
    await owner.execute("TRUNCATE service_impacts")
    for service_id, (level, active) in enumerate(cases, start=1):
        for kind, is_there in (("incident", level is not None), ("maintenance", active)):
            if is_there:
                await owner.execute(
                    "INSERT INTO service_impacts (tenant_id, service_id, stream_kind, stream_id, started_version,"
                    " started_at, ended_at, level, is_excluded) VALUES (1, $1, $2, 1, 1, now(), 'infinity', $3, false)",
                    service_id,
                    kind,
                    level if kind == "incident" else 0,
                )
    found = dict(await owner.fetch("SELECT service_id, status FROM service_status WHERE tenant_id = 1"))
    for service_id, (level, active) in enumerate(cases, start=1):
        expected = service_status([] if level is None else [level], maintenance=active)
        assert found.get(service_id, "operational") == expected, (level, active)
