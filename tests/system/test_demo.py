"""`opsentry demo`: one command starts everything, keeps its data and leaves no process behind."""

import json
import os
import signal
import socket
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import aiohttp
import psutil
import pytest
from yarl import URL

from opsentry.identity.scopes import SCOPES
from tests.conftest import Client
from tests.system.processes import environment, free_port, opsentry, running
from tests.waiting import until

FACTS = {
    "base_url", "pid", "tenant_id", "tenant_slug", "database_url",
    "redis_url", "tokens", "other", "operator", "sink",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all tests: each demo finds the data of the previous one."""
    found = tmp_path_factory.mktemp("demo")
    yield found
    for process in servers(found):
        process.kill()


def servers(folder):
    """Return the processes of PostgreSQL and Valkey that work in the folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd().startswith(str(folder)):
                found.append(process)
    return found


@asynccontextmanager
async def demo(folder):
    """Run the demo, as from a terminal: in a process group of its own."""
    env = environment(OPSENTRY_DEMO_DIR=str(folder), PORT=str(free_port()), OPSENTRY_LOG_LEVEL="error")
    async with running(env, "demo", start_new_session=True) as process:
        await process.line("Opsentry runs at ")
        yield process, json.loads((folder / "demo.json").read_text())


def interrupt(process):
    """Press Ctrl-C: the whole process group receives it."""
    os.killpg(process.pid, signal.SIGINT)


async def titles(api):
    return [(i["title"], i["status"]) for i in (await api.get("/incidents"))[1]["incidents"]]


async def test_the_note_holds_all_facts_and_only_its_owner_reads_it(folder):
    async with demo(folder) as (process, facts), aiohttp.ClientSession() as http:
        assert facts.keys() == FACTS
        assert (folder / "demo.json").stat().st_mode & 0o777 == 0o600
        assert facts["pid"] == process.pid
        assert facts["tokens"].keys() == {"full", "read", "incidents", "maintenance"}
        scopes = {}
        for name, token in {**facts["tokens"], "other": facts["other"]["token"]}.items():
            status, body, _ = await Client(http, facts["base_url"], token).get("/health")
            assert status == 200
            scopes[name] = (body["tenant_id"], body["scopes"])
        mine, other = facts["tenant_id"], facts["other"]["tenant_id"]
        assert mine != other
        assert scopes == {
            "full": (mine, sorted(SCOPES)),
            "read": (mine, ["read:status"]),
            "incidents": (mine, ["write:incidents"]),
            "maintenance": (mine, ["write:maintenance"]),
            "other": (other, sorted(SCOPES)),
        }
        operator = Client(http, facts["base_url"], facts["operator"]["token"])
        assert (await operator.send("GET", "/ops/projections"))[0] == 200
        interrupt(process)
        assert await process.ended() == 0


async def test_the_demo_has_services_incidents_and_windows_of_two_tenants(folder):
    async with demo(folder) as (_, facts), aiohttp.ClientSession() as http:
        api = Client(http, facts["base_url"], facts["tokens"]["full"])
        _, services, _ = await api.get("/services")
        assert services["total"] >= 3
        assert {service["current_status"] for service in services["services"]} > {"operational"}
        _, incidents, _ = await api.get("/incidents")
        assert {incident["status"] for incident in incidents["incidents"]} == {"resolved", "investigating"}
        _, active, _ = await api.get("/incidents/active")
        assert len(active["incidents"]) == 1
        _, windows, _ = await api.get("/maintenance")
        assert sorted(window["status"] for window in windows["maintenance"]) == ["active", "completed", "scheduled"]
        _, upcoming, _ = await api.get("/maintenance/upcoming")
        (window,) = upcoming["maintenance"]
        assert datetime.fromisoformat(window["scheduled_start"]) > datetime.now(UTC)
        status, ready, _ = await api.send("GET", "/health/ready")
        assert (status, ready["status"]) == (200, "ready")

        other = Client(http, facts["base_url"], facts["other"]["token"])
        _, theirs, _ = await other.get("/services")
        assert not {s["name"] for s in theirs["services"]} & {s["name"] for s in services["services"]}
        assert not set(await titles(other)) & set(await titles(api))
        assert (await other.get("/maintenance"))[1]["maintenance"] == []
        # Ids count within a tenant, and the other tenant has fewer services.
        path = f"/services/{max(service['id'] for service in services['services'])}"
        assert (await api.get(path))[0] == 200
        assert (await other.get(path))[0] == 404


async def arrived(http, facts):
    async with http.get(f"{facts['sink']['url']}/arrived.json") as answer:
        return await answer.json()


async def test_an_incident_arrives_as_webhook_slack_message_and_email(folder):
    async with demo(folder) as (process, facts), aiohttp.ClientSession() as http:
        api = Client(http, facts["base_url"], facts["tokens"]["full"])
        _, found, _ = await api.get("/subscriptions")
        subscribed = {each["channel"]: each for each in found["subscriptions"]}
        assert {channel: (each["audience"], each["status"]) for channel, each in subscribed.items()} == {
            "webhook": ("internal", "active"),
            "slack": ("internal", "active"),
            "email": ("public", "active"),
        }
        assert len(found["subscriptions"]) == 3
        own = {"channel": "webhook", "target": f"{facts['sink']['url']}/hook/own"}
        _, mine, _ = await api.post("/subscriptions", own)
        _, made, _ = await api.post("/incidents", {"title": "<b>Deploy</b> failed", "severity": "degraded"})

        async def three_came():
            came = await arrived(http, facts)
            hooks = [hook for hook in came["webhooks"] if hook["body"]["data"]["incident"]["id"] == made["id"]]
            return came if len(hooks) == 2 and came["slack"] and came["emails"] else None

        came = await until(three_came)
        hooks = {hook["path"]: hook for hook in came["webhooks"]}
        hook = hooks["/hook"]
        assert (hook["type"], hook["verified"]) == ("incident.opened", True)
        assert hook["id"] == hook["headers"]["webhook-id"]
        assert datetime.fromisoformat(hook["at"])
        # The sink knows no other secret than that of its own subscription.
        assert not hooks["/hook/own"]["verified"]
        assert mine["secret"].startswith("whsec_")
        assert "&lt;b&gt;Deploy" in came["slack"][0]["body"]["text"]
        letter = came["emails"][0]
        assert letter["to"] == "ops@acme.example"
        assert "Deploy" in letter["subject"]
        assert letter["references"].startswith("<")
        assert letter["headers"]["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
        unsubscribe = letter["headers"]["List-Unsubscribe"].strip("<>")
        assert unsubscribe.startswith(f"{facts['base_url']}/unsubscribe/")
        assert unsubscribe in letter["text"]
        assert unsubscribe in letter["html"]

        async with http.get(f"{facts['sink']['url']}/") as answer:
            shown = await answer.text()
        assert "Valid signature" in shown
        assert f'href="{unsubscribe}"' in shown
        assert "<b>" not in shown

        await api.delete(f"/subscriptions/{mine['id']}")
        interrupt(process)
        assert await process.ended() == 0


async def test_a_reader_signs_up_confirms_by_email_and_receives_notifications(folder):
    async with demo(folder) as (process, facts), aiohttp.ClientSession() as http:
        api = Client(http, facts["base_url"], facts["tokens"]["full"])

        async def letters():
            found = [each for each in (await arrived(http, facts))["emails"] if each["to"] == "jo@example.org"]
            return found[::-1]

        async with http.post(f"{facts['base_url']}/status/acme/subscribe", data={"email": "jo@example.org"}) as answer:
            assert (answer.status, answer.url.path) == (200, "/status/acme/subscribe/sent")
        (asked,) = await until(letters)
        (confirm,) = [word for word in asked["text"].split() if "/confirm/" in word]
        assert "List-Unsubscribe" not in asked["headers"]
        async with http.get(confirm) as answer:
            assert answer.status == 200
        assert [
            each["status"]
            for each in (await api.get("/subscriptions?channel=email&status=pending"))[1]["subscriptions"]
        ] == ["pending"]
        async with http.post(confirm) as answer:
            assert answer.status == 200
        await api.post("/incidents", {"title": "Mail queue stuck"})

        async def notified():
            return (await letters())[1:]

        (letter,) = await until(notified)
        assert "Mail queue stuck" in letter["subject"]
        async with http.post(letter["headers"]["List-Unsubscribe"].strip("<>")) as answer:
            assert answer.status == 200
        assert [each["target"] for each in (await api.get("/subscriptions?channel=email"))[1]["subscriptions"]] == [
            "ops@acme.example"
        ]
        interrupt(process)
        assert await process.ended() == 0


async def test_subscriptions_follow_the_sink_and_removed_ones_stay_removed(tmp_path):
    async with demo(tmp_path) as (process, facts), aiohttp.ClientSession() as http:
        api = Client(http, facts["base_url"], facts["tokens"]["full"])
        _, before, _ = await api.get("/subscriptions")
        (mail,) = [each for each in before["subscriptions"] if each["channel"] == "email"]
        _, made, _ = await api.post("/incidents", {"title": "Deploy failed"})

        async def came():
            return (await arrived(http, facts))["emails"]

        (letter,) = await until(came)
        unsubscribe = letter["headers"]["List-Unsubscribe"].strip("<>")
        async with http.post(unsubscribe, data={"List-Unsubscribe": "One-Click"}) as answer:
            assert answer.status == 200
        assert (await api.get(f"/subscriptions/{mail['id']}"))[0] == 404
        assert (tmp_path / "encryption-key").stat().st_mode & 0o777 == 0o600
        interrupt(process)
        assert await process.ended() == 0
    # Another process now listens at the previous address of the sink.
    taken = socket.create_server(("127.0.0.1", URL(facts["sink"]["url"]).port))
    async with demo(tmp_path) as (process, again), aiohttp.ClientSession() as http:
        taken.close()
        assert again["sink"]["url"] != facts["sink"]["url"]
        api = Client(http, again["base_url"], again["tokens"]["full"])
        _, after, _ = await api.get("/subscriptions")
        assert {each["channel"]: each["target"] for each in after["subscriptions"]} == {
            "webhook": f"{again['sink']['url']}/hook",
            "slack": f"{again['sink']['url']}/…",
        }
        assert {each["id"] for each in after["subscriptions"]} < {each["id"] for each in before["subscriptions"]}
        assert (await api.post(f"/incidents/{made['id']}/resolve"))[0] == 200

        async def resolved():
            found = await arrived(http, again)
            return found["slack"] and [hook["type"] for hook in found["webhooks"] if hook["verified"]]

        assert await until(resolved) == ["incident.resolved"]
        interrupt(process)
        assert await process.ended() == 0


@pytest.mark.parametrize(
    "stop", [interrupt, lambda process: os.kill(process.pid, signal.SIGINT)], ids=["ctrl-c", "pid"]
)
async def test_an_interrupt_stops_all_started_processes(folder, stop):
    async with demo(folder) as (process, _):
        assert {started.name() for started in servers(folder)} == {"postgres", "valkey-server"}
        stop(process)
        assert await process.ended() == 0
    assert servers(folder) == []


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_keeps_data_and_tokens(folder, end):
    async with demo(folder) as (process, before), aiohttp.ClientSession() as http:
        api = Client(http, before["base_url"], before["tokens"]["full"])
        status, made, _ = await api.post("/incidents", {"title": f"Before {end.name}"})
        assert status == 201
        shown = await titles(api)
        process.process.send_signal(end)
        assert await process.ended() == (0 if end == signal.SIGTERM else -end)
    async with demo(folder) as (process, after), aiohttp.ClientSession() as http:
        for key in ("tokens", "other", "operator"):
            assert after[key] == before[key]
        api = Client(http, after["base_url"], after["tokens"]["full"])
        assert await titles(api) == shown
        assert (await api.post(f"/incidents/{made['id']}/resolve"))[0] == 200
        interrupt(process)
        assert await process.ended() == 0
    assert servers(folder) == []


async def test_a_second_demo_in_the_folder_is_refused(folder):
    async with demo(folder) as (process, facts), aiohttp.ClientSession() as http:
        second = await opsentry(environment(OPSENTRY_DEMO_DIR=str(folder), PORT=str(free_port())), "demo")
        assert (second.code, second.out) == (1, "")
        assert second.err == f"Error: another demo runs in {folder}\n"
        assert json.loads((folder / "demo.json").read_text()) == facts
        assert (await Client(http, facts["base_url"], facts["tokens"]["read"]).get("/services"))[0] == 200
        interrupt(process)
        assert await process.ended() == 0


def terminate(process):
    os.kill(process.pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("says", "stop"),
    [("starting PostgreSQL", interrupt), ("starting Valkey", interrupt), ("starting Valkey", terminate)],
)
async def test_an_end_during_startup_leaves_no_process(tmp_path, says, stop):
    env = environment(OPSENTRY_DEMO_DIR=str(tmp_path), PORT=str(free_port()))
    async with running(env, "demo", start_new_session=True) as process:
        await process.line(says)
        stop(process)
        assert await process.ended() != 0
    assert servers(tmp_path) == []
    async with demo(tmp_path) as (process, _):
        interrupt(process)
        assert await process.ended() == 0


async def test_a_first_start_that_was_killed_half_way_starts_over(tmp_path):
    env = environment(OPSENTRY_DEMO_DIR=str(tmp_path), PORT=str(free_port()))
    async with running(env, "demo", start_new_session=True) as process:

        async def half_made():
            return (tmp_path / "postgres" / "PG_VERSION").exists()

        await until(half_made)
        os.killpg(process.pid, signal.SIGKILL)
        assert await process.ended() == -9
    async with demo(tmp_path) as (process, _):
        interrupt(process)
        assert await process.ended() == 0
    assert servers(tmp_path) == []


async def test_a_taken_or_invalid_port_is_an_error_and_leaves_no_process(folder):
    async with demo(folder) as (process, facts):
        port = facts["base_url"].rpartition(":")[2]
        env = environment(OPSENTRY_DEMO_DIR=str(folder.parent / "elsewhere"), PORT=port)
        taken = await opsentry(env, "demo")
        assert taken.code == 1
        # The worker may have logged before.
        assert taken.err.splitlines()[-1].startswith("Error: ")
        assert "address already in use" in taken.err
        assert servers(folder.parent / "elsewhere") == []
        interrupt(process)
        assert await process.ended() == 0
    for port in ("http", "70000", "-1"):
        assert (await opsentry(env | {"PORT": port}, "demo")).code == 2
