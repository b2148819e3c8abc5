"""The example responses in the reference are what the server answers.

`WRITE_EXAMPLES=1` writes those that differ: `make reference`.
"""

import json
import os
import re
from collections import defaultdict
from pathlib import Path

from opsentry.bootstrap import OPERATIONS
from tests.conftest import make_service
from tests.notifications.driver import DeliveryDriver, delivered

FOLDER = Path(__file__).parents[2] / "docs" / "reference" / "examples"
BY_ID = {operation.id: operation for operation in OPERATIONS}
# The reference has the whole document beside the examples.
ELSEWHERE = {"get_openapi_document"}
# Values that differ from run to run.
VARYING = (
    r"\d{4}-\d\d-\d\d(T[\d:.]+Z)?",
    r"[0-9a-f]{8,}",
    r"whsec_[\w+/=]+",
    r'(?<=_ms": )[\d.]+',
    r'(?<=_seconds": )[\d.]+',
    r'(?<=_percent": )[\d.]+',
)


class Recorder:
    """Calls operations by their ids and keeps each response."""

    def __init__(self) -> None:
        self.shown: dict[str, str] = {}

    async def call(self, client, id_, query="", **names):
        operation = BY_ID[id_]
        path = operation.path.format(**names) + query
        status, body, headers = await client.send(operation.method, path, json=operation.example or None)
        assert status == operation.status, (id_, status, body)
        request = [f"```json\n{to_text(operation.example)}\n```"] if operation.example else []
        if isinstance(body, str):
            language = "jsonl" if "ndjson" in headers.get("Content-Type", "") else "text"
            response = [f"```{language}\n{body.strip()}\n```"] if body else []
        else:
            response = [f"```json\n{to_text(body)}\n```"]
        lines = [f"## {operation.summary}", f"`{operation.method} {path}`", *request, f"Response {status}"]
        lines[-1] += ":" if response else ", without a body."
        self.shown[id_] = "\n\n".join([*lines, *response])
        return body

    def pages(self):
        """Return the text of each page by its path, one page for each tag."""
        sections = defaultdict(list)
        for operation in OPERATIONS:
            if operation.id not in ELSEWHERE:
                sections[operation.tag].append(self.shown[operation.id])
        return {
            FOLDER / f"{tag.lower()}.md": "\n\n".join([f"# Examples: {tag.lower()}", *found]) + "\n"
            for tag, found in sections.items()
        }


def to_text(body):
    return json.dumps(body, indent=2, ensure_ascii=False)


def constant(text):
    for pattern in VARYING:
        text = re.sub(pattern, "~", text)
    return text


async def record(parts, acme, api, operator):
    recorder = Recorder()
    call = recorder.call
    await make_service(parts, acme.id, "customer-portal", name="Customer Portal", tags=("web",))
    for probe in ("probe", "get_liveness", "get_readiness", "verify_token"):
        await call(api, probe)
    subscription = (await call(api, "create_subscription"))["id"]
    incident = (await call(api, "create_incident"))["id"]
    for id_ in ("change_incident", "post_incident_update"):
        await call(api, id_, id=incident)
    await call(api, "list_active_incidents")
    for id_ in ("resolve_incident", "redact_incident", "get_incident", "list_incident_events"):
        await call(api, id_, id=incident)
    await call(api, "list_incidents", "?limit=1")
    window = (await call(api, "schedule_maintenance"))["id"]
    await call(api, "change_maintenance", id=window)
    await call(api, "list_upcoming_maintenance")
    for id_ in ("start_maintenance", "complete_maintenance", "redact_maintenance", "get_maintenance"):
        await call(api, id_, id=window)
    await call(api, "list_maintenance_events", "?limit=2", id=window)
    await call(api, "list_maintenance", "?limit=1")
    cancelled = (await call(api, "schedule_maintenance"))["id"]
    await call(api, "cancel_maintenance", id=cancelled)
    await call(api, "list_services")
    for id_ in ("get_service", "get_service_uptime"):
        await call(api, id_, id=1)
    await call(api, "get_daily_uptime", "?days=2", id=1)
    await call(api, "get_tenant_uptime")
    for id_ in ("list_subscriptions", "change_subscription", "get_subscription", "rotate_secret", "test_subscription"):
        await call(api, id_, **({} if id_ == "list_subscriptions" else {"id": subscription}))
    driver = DeliveryDriver(parts, acme)
    await driver.enqueue()
    (endpoint,), (due, *_) = await driver.lease()
    await driver.record(delivered(endpoint, due))
    page = await call(api, "list_deliveries", "?limit=1&state=delivered", id=subscription)
    delivery = page["deliveries"][0]["id"]
    for id_ in ("get_delivery", "redeliver"):
        await call(api, id_, id=subscription, delivery_id=delivery)
    for id_ in ("list_projection_status", "list_halted_projections", "list_sending_status"):
        await call(operator, id_)
    await call(api, "list_events", "?limit=2")
    await call(api, "get_ledger_head")
    await call(api, "export_events", "?to_position=1")
    await call(api, "remove_subscription", id=subscription)
    return recorder


async def test_examples_are_what_the_server_answers(parts, acme, api, operator):
    recorder = await record(parts, acme, api, operator)
    assert set(recorder.shown) == set(BY_ID) - ELSEWHERE
    pages = recorder.pages()
    if os.environ.get("WRITE_EXAMPLES"):
        for path, text in pages.items():
            if not path.exists() or constant(path.read_text()) != constant(text):
                path.write_text(text)
    assert set(FOLDER.glob("*.md")) == set(pages)
    for path, text in pages.items():
        assert constant(path.read_text()) == constant(text)
