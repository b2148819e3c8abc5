"""Check that entity tags follow the body, and that `If-None-Match` saves sending an unchanged one."""

from datetime import UTC, datetime, timedelta

import pytest

from tests.api.conftest import (
    READ_PATHS,
    each_read,
    etag,
    read_if_none_match,
    rename,
    send_command,
)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@each_read
async def test_an_unchanged_body_is_not_sent_again(api, ids, path, method):
    path = path.format(**ids)
    status, octets, headers = await read_if_none_match(api, path, method=method)
    assert (status, bool(octets)) == (200, method == "GET")
    known = headers["ETag"]
    opaque = known.removeprefix("W/")
    for tags in ([known], ["*"], [f'"x", {known}'], ['"x"', known], [opaque], [f"W/{opaque}"]):
        status, octets, again = await read_if_none_match(api, path, *tags, method=method)
        assert (status, octets) == (304, b"")
        for name in ("ETag", "Opsentry-Position", "Link", "Opsentry-Lag-Events"):
            assert again.get(name) == headers.get(name)
        assert "Content-Type" not in again
    for tags in (['"x"'], [""], [opaque.strip('"')], ['"x", W/"y"']):
        assert (await read_if_none_match(api, path, *tags, method=method))[0] == 200


async def test_head_answers_with_the_headers_of_get(api, ids):
    for path in READ_PATHS:
        _, octets, got = await read_if_none_match(api, path.format(**ids))
        status, nothing, told = await read_if_none_match(api, path.format(**ids), method="HEAD")
        assert (status, nothing, int(told["Content-Length"])) == (200, b"", len(octets))
        for name in ("ETag", "Opsentry-Position", "Content-Type", "Link"):
            assert told.get(name) == got.get(name)


async def test_a_changed_body_is_sent_with_another_tag(api, ids):
    paths = [path.format(**ids) for path in READ_PATHS]
    before = {path: await read_if_none_match(api, path) for path in paths}
    since = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    outage = {"title": "O", "severity": "major_outage", "service_ids": [ids["service"]], "occurred_at": since}
    await api.post("/incidents", outage)
    await api.patch(f"/incidents/{ids['incident']}", {"title": "B"})
    await api.post(f"/maintenance/{ids['scheduled']}/cancel")
    for path, (_, octets, headers) in before.items():
        status, changed, after = await read_if_none_match(api, path, headers["ETag"])
        assert (path, status) == (path, 200)
        assert changed != octets
        assert after["ETag"] != headers["ETag"]
        assert (await read_if_none_match(api, path, after["ETag"], headers["ETag"], method="HEAD"))[0] in {200, 304}


async def test_a_renamed_service_changes_the_tags_of_all_bodies_that_show_it(api, parts, acme, ids):
    paths = [path.format(**ids) for path in READ_PATHS if "uptime" not in path]
    before = {path: await read_if_none_match(api, path) for path in paths}
    await rename(parts, acme, ids["service"])
    for path, (_, octets, headers) in before.items():
        status, changed, after = await read_if_none_match(api, path, headers["ETag"])
        assert (path, status) == (path, 200)
        assert changed != octets
        assert after["ETag"] != headers["ETag"]


async def test_a_second_new_name_changes_the_tags_again(api, parts, acme, ids):
    for path in (f"/incidents/{ids['incident']}", f"/maintenance/{ids['scheduled']}", f"/services/{ids['service']}"):
        tags = [await etag(api, path)]
        for name in ("B", "C", "D"):
            await rename(parts, acme, ids["service"], f"{path} {name}")
            tags.append(await etag(api, path))
        assert len(set(tags)) == 4


async def test_a_service_in_another_state_changes_the_tags_of_all_bodies_that_show_it(api, ids):
    body = {"title": "O", "severity": "critical", "service_ids": [ids["service"]]}
    paths = [
        "/services",
        f"/services/{ids['service']}",
        "/services?status=operational",
        "/services?status=major_outage",
    ]
    before = {path: await read_if_none_match(api, path) for path in paths}
    _, outage, _ = await api.post("/incidents", body)
    during = {path: await read_if_none_match(api, path, before[path][2]["ETag"]) for path in paths}
    await api.post(f"/incidents/{outage['id']}/resolve")
    after = {path: await read_if_none_match(api, path, during[path][2]["ETag"]) for path in paths}
    for path in paths:
        assert [during[path][0], after[path][0]] == [200, 200]
        assert before[path][1] == after[path][1] != during[path][1]


async def test_each_state_of_a_service_has_its_tag(api, ids):
    tags = [await etag(api, f"/services/{ids['service']}")]
    for severity in ("degraded", "partial_outage", "major_outage"):
        await api.patch(f"/incidents/{ids['incident']}", {"severity": severity})
        tags.append(await etag(api, f"/services/{ids['service']}"))
    assert len(set(tags)) == 4


async def test_an_answer_to_a_command_has_the_tag_of_a_read(api, parts, acme, ids):
    await rename(parts, acme, ids["service"])
    path = f"/incidents/{ids['incident']}"
    for method, where, body in (
        ("PATCH", path, {"title": "B"}),
        ("PATCH", path, {}),
        ("POST", f"{path}/updates", {"message": "M"}),
        ("POST", f"{path}/resolve", {}),
    ):
        _, _, headers = await send_command(api, method, where, body)
        assert (await read_if_none_match(api, path, headers["ETag"]))[0] == 304


async def test_a_missing_resource_or_a_refused_request_is_no_304(api, ids):
    assert (await read_if_none_match(api, "/incidents/999", "*"))[0] == 404
    assert (await read_if_none_match(api, "/incidents?limit=x", "*"))[0] == 400
    headers = {"If-None-Match": "*"}
    assert (await api.post("/incidents", {"title": "A"}, headers=headers))[0] == 201
    assert (await api.patch(f"/incidents/{ids['incident']}", {"title": "B"}, headers=headers))[0] == 200


async def test_a_page_is_not_taken_for_another_tenants(api, other_api, globex, ids):
    for path in ("/incidents", "/events/head"):
        _, _, headers = await read_if_none_match(api, path)
        status, octets, _ = await read_if_none_match(other_api, path)
        assert (status, b'"A"' in octets) == (200, False)
        assert headers["ETag"]
