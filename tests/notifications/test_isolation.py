"""Two tenants with equal ids never appear in each other's messages."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest

from opsentry.bootstrap import core, sending
from opsentry.demo.sink import sink
from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.incident import OpenIncident, PostUpdate, ResolveIncident
from opsentry.domain.maintenance import ScheduleMaintenance
from opsentry.domain.subscription import CreateSubscription
from opsentry.infrastructure.encryption import SecretBox
from opsentry.notifications.messages.links import UNSUBSCRIBE, SignedLinks
from opsentry.notifications.messages.signing import new_secret
from tests import commands
from tests.conftest import META, Tenant, make_service, make_tenant
from tests.notifications.conftest import LOOPBACK
from tests.waiting import until

SLUGS = ("acme", "globex")


class Story(NamedTuple):
    """A tenant with one incident, one maintenance window and four subscriptions."""

    tenant: Tenant
    incident_id: int
    maintenance_id: int
    subscription_ids: dict[str, int]


def canary(slug):
    return f"canary-of-{slug}"


async def make_story(parts, slug, url):
    """Create the same story for each tenant; all its texts contain the tenant's canary."""
    tenant, box, name = await make_tenant(parts, slug), SecretBox(parts.settings.encryption_keys), canary(slug)

    async def create(kind, command):
        return (await commands.create(parts, kind.DECIDER, tenant.id, command, META)).stream_id

    service_id = await make_service(parts, tenant.id, name, name=name)
    slack, address = f"{url}/slack/{name}", f"{name}@example.com"
    secrets = {"webhook": box.encrypt(new_secret()), "slack": box.encrypt(slack)}
    targets = {"webhook": f"{url}/hook/{name}", "slack": f"{url}/…", "email": address}
    subscription_ids = {
        channel: await create(
            subscription,
            CreateSubscription(
                channel=channel, target=target, audience="internal", encrypted_secret=secrets.get(channel)
            ),
        )
        for channel, target in targets.items()
    }
    pending = CreateSubscription(channel="email", target=f"pending-{address}", audience="public", pending=True)
    subscription_ids["pending"] = await create(subscription, pending)
    incident_id = await create(
        incident, OpenIncident(title=name, description=f"{name} is down", service_ids=(service_id,))
    )
    for command in (PostUpdate(message=f"{name} says so"), ResolveIncident(root_cause=name, postmortem=name)):
        await commands.change(parts, incident.DECIDER, tenant.id, incident_id, command, META)
    start = datetime.now(UTC) + timedelta(days=1)
    window = ScheduleMaintenance(title=name, scheduled_start=start, scheduled_end=start + timedelta(hours=1))
    maintenance_id = await create(maintenance, window)
    await parts.projector.catch_up(tenant.id, 0)
    return Story(tenant, incident_id, maintenance_id, subscription_ids)


@pytest.fixture
async def received(settings):
    """Run both stories through all channels; return them with all messages that arrived."""
    async with sink(mailbox=True) as inbox:
        own = replace(settings, smtp_url=inbox.smtp_url, webhook_allowed_networks=LOOPBACK, coalesce_seconds=0.0)
        async with core(own) as parts:
            stories = {slug: await make_story(parts, slug, inbox.url) for slug in SLUGS}

            async def all_arrived():
                await asyncio.gather(*(parts.projector.catch_up(story.tenant.id, 0) for story in stories.values()))
                # Incident and window over three subscriptions, and one confirmation, for each tenant.
                subjects = {(hook["path"], kind) for hook in inbox.webhooks for kind in hook["body"]["data"]}
                titles = {each["body"]["text"].partition("]")[2] for each in inbox.slack}
                mails = {(each["to"], each["subject"]) for each in inbox.emails}
                return (
                    len(subjects) == 2 * 2
                    and all(any(canary(slug) in t and "Maintenance" in t for t in titles) for slug in SLUGS)
                    and all(any("Maintenance" in s and canary(slug) in to for to, s in mails) for slug in SLUGS)
                    and sum("Confirm" in subject for _, subject in mails) == 2
                )

            async with sending(parts):
                await until(all_arrived)
        yield stories, inbox, SignedLinks(own)


async def test_no_message_contains_another_tenants_texts(received):
    stories, inbox, links = received
    acme, globex = stories.values()
    assert acme[1:] == globex[1:]
    for own, other in (SLUGS, SLUGS[::-1]):
        hooks = [hook for hook in inbox.webhooks if canary(own) in hook["path"]]
        slacks = [message for message in inbox.slack if canary(own) in message["path"]]
        emails = [email for email in inbox.emails if canary(own) in email["to"]]
        assert hooks
        assert slacks
        assert emails
        for message in (*hooks, *slacks, *emails):
            assert canary(other) not in json.dumps(message)
        for hook in hooks:
            assert hook["body"]["tenant"]["slug"] == own
        for email in emails:
            assert own.title() in email["subject"]
            link = email["headers"].get("List-Unsubscribe")
            if link is not None:
                ids = links.verify(UNSUBSCRIBE, link.strip("<>").rpartition("/")[2])
                assert ids == (stories[own].tenant.id, stories[own].subscription_ids["email"])
    # The ids of messages and threads are derived from the tenant as well.
    assert len({hook["id"] for hook in inbox.webhooks}) == len(inbox.webhooks)
    threads = {slug: {e["references"] for e in inbox.emails if canary(slug) in e["to"]} for slug in SLUGS}
    assert threads["acme"].isdisjoint(threads["globex"])
