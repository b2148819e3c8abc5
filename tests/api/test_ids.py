import pytest

from opsentry.api.v1 import OPERATIONS
from tests.api.conftest import head, raw

NOT_FOUND = (404, b'{"error":"not found"}')
IMPOSSIBLE = [
    "0", "-1", "-0", "+1", "01", "1.0", "1e0", "0x1", "1_0", "abc", "null", "NaN", "%00", "1%00", "1%20", "%201",
    "1%0A", "%C2%B9", "%D9%A1", "%EF%BC%91", "%ff", "%zz", "%31x", "1%2Fupdates", "1%2f", "..%2f1", "1;a=b", "1,2",
    "*", "'", "1'--", "9223372036854775808", "18446744073709551617", "9" * 400,
]  # fmt: skip
NEVER_WAS = ["987654321", "9223372036854775807"]


def routes_of(kind):
    for method, path in ((o.method, o.path.removeprefix("/api/v1")) for o in OPERATIONS):
        if path.startswith(f"/{kind}/{{id}}"):
            yield method, path.replace("{delivery_id}", f"msg_{1:032x}")


def valid_body(method):
    return {} if method == "GET" else {"json": {"message": "m", "title": "T", "reason": "r", "fields": ["title"]}}


@pytest.mark.parametrize("kind", ["services", "incidents", "maintenance", "subscriptions"])
async def test_foreign_missing_and_impossible_ids_are_the_same_404(api, other_api, parts, acme, things, kind):
    before = await head(parts, acme.id)
    for method, path in routes_of(kind):
        for bad in [*IMPOSSIBLE, *NEVER_WAS]:
            answer = await raw(api, method, path.replace("{id}", bad), **valid_body(method))
            assert answer == NOT_FOUND, (method, path, bad)
        foreign = path.replace("{id}", str(things[kind]))
        assert await raw(other_api, method, foreign, **valid_body(method)) == NOT_FOUND
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("kind", ["services", "incidents", "maintenance", "subscriptions"])
async def test_missing_and_foreign_are_answered_with_the_same_headers(api, other_api, things, kind):
    async def names(client, number):
        return set((await client.get(f"/{kind}/{number}"))[2])

    assert await names(other_api, things[kind]) == await names(api, 987654321) == await names(api, "abc")


async def test_an_id_that_is_written_in_percents_is_the_same_id(api, things):
    encoded = "".join(f"%{ord(digit):x}" for digit in str(things["incidents"]))
    assert (await api.get(f"/incidents/{encoded}"))[1]["id"] == things["incidents"]


async def test_ids_of_one_kind_are_none_of_another(api, things):
    for kind in things:
        for other, number in things.items():
            status = (await api.get(f"/{kind}/{number}"))[0]
            assert status == (200 if number == things[kind] else 404), (kind, other)
