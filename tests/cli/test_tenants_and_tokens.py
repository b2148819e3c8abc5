import json

from opsentry.identity import api_tokens, tokens
from tests.conftest import Client
from tests.waiting import until


async def test_a_tenant_is_created_once_and_listed(run, fail):
    (made,) = json.loads(await run("tenant", "create", "acme", "--name", "Acme Cloud", "--json"))
    assert made["slug"] == "acme"
    (listed,) = json.loads(await run("tenant", "list", "--json"))
    assert (listed["tenant_id"], listed["slug"], listed["name"]) == (made["tenant_id"], "acme", "Acme Cloud")
    assert listed["created_at"].endswith("Z")
    assert "Acme Cloud" in await run("tenant", "list")
    assert await fail(1, "tenant", "create", "acme") == "Error: slug: acme is taken"
    assert (await fail(2, "tenant", "create", "Acme!")).startswith("Error: slug: must be 1 to 63 of")
    assert await fail(2, "tenant", "create", "blank", "--name", " ") == "Error: name: must not be blank"
    assert len(json.loads(await run("tenant", "list", "--json"))) == 1


async def test_a_token_works_until_it_is_revoked_and_is_printed_once(run, fail, acme, anonymous, owner):
    value = (await run("token", "create", "--tenant", "acme", "--name", "CI", "--scope", "read:status")).removesuffix(
        "\n"
    )
    assert tokens.is_well_formed(value, api_tokens.API_TOKEN_MARK)
    api = Client(anonymous.session, anonymous.base_url, value)
    status, health, _ = await api.get("/health")
    assert (status, health["tenant_id"], health["scopes"]) == (200, acme.id, ["read:status"])
    assert (await api.post("/incidents", {"title": "x"}))[0] == 403

    prefix = tokens.public_prefix(value)
    listed = json.loads(await run("token", "list", "--tenant", "acme", "--json"))
    assert [(one["prefix"], one["name"], one["scopes"], one["revoked_at"]) for one in listed][1] == (
        prefix,
        "CI",
        ["read:status"],
        None,
    )
    secret = value[12:]
    table = await run("token", "list", "--tenant", "acme")
    assert prefix in table
    stored = [str(await owner.fetch(f"SELECT * FROM {name}")) for name in ("api_tokens", "events", "reservations")]
    for text in (json.dumps(listed), table, *stored):
        assert secret not in text

    assert await run("token", "revoke", "--tenant", "acme", prefix) == f"revoked {prefix}\n"

    async def refused():
        return (await api.get("/health"))[0] == 401

    await until(refused)
    again = await fail(1, "token", "revoke", "--tenant", "acme", prefix)
    assert again == f"Error: no active token has the prefix {prefix}; nothing was revoked"
    listed = json.loads(await run("token", "list", "--tenant", "acme", "--json"))
    assert listed[1]["revoked_at"] is not None


async def test_a_token_is_printed_as_json(run, acme, anonymous):
    arguments = ("--tenant", "acme", "--name", "CI", "--scope", "write:incidents", "--scope", "read:status", "--json")
    (made,) = json.loads(await run("token", "create", *arguments, "--expires", "2999-01-01"))
    assert made["prefix"] == tokens.public_prefix(made["token"])
    _, health, _ = await Client(anonymous.session, anonymous.base_url, made["token"]).get("/health")
    assert health["scopes"] == ["read:status", "write:incidents"]
    listed = json.loads(await run("token", "list", "--tenant", "acme", "--json"))
    assert listed[1]["expires_at"] == "2999-01-01T00:00:00Z"


async def test_an_expired_token_is_refused(run, acme, anonymous):
    value = await run(
        "token", "create", "--tenant", "acme", "--name", "Old", "--scope", "read:status", "--expires", "2020-01-01"
    )
    assert (await Client(anonymous.session, anonymous.base_url, value.strip()).get("/health"))[0] == 401


async def test_invalid_tokens_are_refused(fail, acme, globex):
    create = ("token", "create", "--tenant", "acme", "--name")
    assert "scopes: must be one or more of" in await fail(2, *create, "CI", "--scope", "write:everything")
    assert await fail(2, *create, "", "--scope", "read:status") == "Error: name: must not be blank"
    nobody = ("token", "create", "--tenant", "nobody", "--name", "CI", "--scope", "read:status")
    assert await fail(1, *nobody) == "Error: no tenant has the slug nobody"
    foreign = tokens.public_prefix(globex.token)
    error = await fail(1, "token", "revoke", "--tenant", "acme", foreign)
    assert error == f"Error: no active token has the prefix {foreign}; nothing was revoked"


async def test_a_service_is_registered_once_and_listed(run, fail, acme, globex, api):
    create = ("service", "create", "--tenant", "acme", "main-api")
    fields = ("--name", "Main API", "--description", "REST", "--visibility", "internal", "--tag", "prod", "--tag", "eu")
    (made,) = json.loads(await run(*create, *fields, "--json"))
    _, shown, _ = await api.get(f"/services/{made['service_id']}")
    assert (shown["slug"], shown["name"], shown["description"]) == ("main-api", "Main API", "REST")
    assert (shown["visibility"], shown["tags"]) == ("internal", ["prod", "eu"])
    (listed,) = json.loads(await run("service", "list", "--tenant", "acme", "--json"))
    assert (listed["id"], listed["current_status"]) == (made["service_id"], "operational")
    assert json.loads(await run("service", "list", "--tenant", "globex", "--json")) == []
    assert (
        await fail(1, *create)
        == f"Error: slug: main-api is taken by service {made['service_id']}; nothing was registered"
    )
    assert "slug: must be" in await fail(2, "service", "create", "--tenant", "acme", "Main API")
    assert "'--visibility'" in await fail(2, *create, "--visibility", "secret")
    assert "no tenant has the slug nobody" in await fail(1, "service", "list", "--tenant", "nobody")
