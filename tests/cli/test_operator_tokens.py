import json

from opsentry.identity import operator_tokens, tokens
from tests.conftest import Client
from tests.waiting import until


async def test_a_token_works_until_it_is_revoked_and_is_printed_once(run, fail, anonymous):
    value = (await run("operator", "token", "create", "on call")).removesuffix("\n")
    assert tokens.is_well_formed(value, operator_tokens.OPERATOR_TOKEN_MARK)
    operator = Client(anonymous.session, anonymous.base_url, value)
    assert (await operator.send("GET", "/ops/projections"))[0] == 200

    prefix = tokens.public_prefix(value)
    (listed,) = json.loads(await run("operator", "token", "list", "--json"))
    assert listed.keys() == {"prefix", "name", "created_at", "expires_at", "revoked_at"}
    assert (listed["prefix"], listed["name"], listed["revoked_at"]) == (prefix, "on call", None)
    assert listed["created_at"].endswith("Z")
    table = await run("operator", "token", "list")
    assert prefix in table
    assert value[12:] not in table

    assert await run("operator", "token", "revoke", prefix) == f"revoked {prefix}\n"

    async def refused():
        return (await operator.send("GET", "/ops/projections"))[0] == 401

    await until(refused)
    error = f"Error: no active token has the prefix {prefix}; nothing was revoked"
    assert await fail(1, "operator", "token", "revoke", prefix) == error
    (listed,) = json.loads(await run("operator", "token", "list", "--json"))
    assert listed["revoked_at"] is not None


async def test_a_token_is_printed_as_json(run, anonymous):
    create = ("operator", "token", "create", "dashboard", "--json", "--expires")
    (made,) = json.loads(await run(*create, "2999-01-01"))
    assert made == {"token": made["token"], "prefix": tokens.public_prefix(made["token"])}
    (late,) = json.loads(await run(*create, "2020-01-01T12:30:00Z"))
    listed = json.loads(await run("operator", "token", "list", "--json"))
    assert [one["expires_at"] for one in listed] == ["2999-01-01T00:00:00Z", "2020-01-01T12:30:00Z"]
    for one, expected in ((made, 200), (late, 401)):
        client = Client(anonymous.session, anonymous.base_url, one["token"])
        assert (await client.send("GET", "/ops/projections"))[0] == expected


async def test_invalid_tokens_are_refused(run, fail, acme):
    assert await fail(2, "operator", "token", "create", " ") == "Error: name: must not be blank"
    prefix = tokens.public_prefix(acme.token)
    error = await fail(1, "operator", "token", "revoke", prefix)
    assert error == f"Error: no active token has the prefix {prefix}; nothing was revoked"
    assert json.loads(await run("operator", "token", "list", "--json")) == []
