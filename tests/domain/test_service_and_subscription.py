from datetime import UTC, datetime

import pytest

from opsentry.domain import service, subscription
from opsentry.domain.decider import IllegalTransition, InvalidField
from opsentry.domain.service import ChangeService, RegisterService, RetireService, ServiceChanged, ServiceRegistered
from opsentry.domain.service import ServiceRetired as Retired
from opsentry.domain.subscription import (
    CreateSubscription,
    ExpireSubscription,
    RemoveSubscription,
    RotateSecret,
    SubscriptionConfirmed,
    SubscriptionCreated,
    SubscriptionDisabled,
    SubscriptionRedacted,
    SubscriptionSecretRotated,
)
from opsentry.domain.subscription import SubscriptionRemoved as Removed
from tests.domain.spec import given

API = ServiceRegistered(slug="main-api", name="Main API", visibility="public", tags=("prod",))
HOOK = SubscriptionCreated(channel="webhook", target="https://example.com/hook", audience="public")


def test_a_service_is_registered():
    command = RegisterService(slug="main-api", name="Main API", tags=("prod",))
    given(service.DECIDER).when(command).then(API)


@pytest.mark.parametrize("slug", ["", "-a", "a-", "A", "ä", "a b", "a" * 64])
def test_an_invalid_slug_is_refused(slug):
    given(service.DECIDER).when(RegisterService(slug=slug, name="N")).refused(InvalidField, "slug: must be")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (RegisterService(slug="a", name=" "), "name: must not be blank"),
        (RegisterService(slug="a", name="N", visibility="x"), "visibility: must be one of"),
        (RegisterService(slug="a", name="N", tags=("",)), "tags: must not be blank"),
        (RegisterService(slug="a", name="N", tags=("t",) * 51), "tags: must be at most"),
        (RegisterService(slug="a", name="N", description="\x00"), "description: must not contain"),
    ],
)
def test_registering_with_an_invalid_field_names_the_field(command, message):
    given(service.DECIDER).when(command).refused(InvalidField, message)


def test_only_differing_fields_are_changed():
    command = ChangeService(name="Main API", description="The API", tags=())
    given(service.DECIDER, API).when(command).then(ServiceChanged(description="The API", tags=()))
    given(service.DECIDER, API).when(ChangeService(name="Main API", visibility="public")).then()


def test_a_retired_service_is_gone():
    given(service.DECIDER, API).when(RetireService()).then(Retired())
    given(service.DECIDER, API, Retired()).when(RetireService()).refused(IllegalTransition, "does not exist")
    given(service.DECIDER, API, Retired()).when(ChangeService(name="N")).refused(IllegalTransition, "does not exist")


def test_a_subscription_is_created_and_removed():
    command = CreateSubscription(channel="webhook", target="https://example.com/hook")
    given(subscription.DECIDER).when(command).then(HOOK)
    given(subscription.DECIDER, HOOK).when(RemoveSubscription()).then(Removed())
    given(subscription.DECIDER, HOOK, Removed()).when(RemoveSubscription()).refused(IllegalTransition, "does not exist")


def test_only_a_pending_subscription_expires():
    waiting = SubscriptionCreated(channel="email", target="jo@example.org", audience="public", pending=True)
    lapse = ExpireSubscription(versions=(1,))
    given(subscription.DECIDER, waiting).when(lapse).then(Removed(), SubscriptionRedacted(versions=(1,)))
    given(subscription.DECIDER, waiting, SubscriptionConfirmed()).when(lapse).then()
    off = SubscriptionDisabled(reason="disabled_by_owner")
    given(subscription.DECIDER, waiting, SubscriptionConfirmed(), off).when(lapse).then()
    given(subscription.DECIDER, waiting, Removed()).when(lapse).refused(IllegalTransition, "does not exist")


def test_a_first_secret_has_no_previous_one():
    until = datetime(2026, 3, 1, tzinfo=UTC)
    rotated = [
        SubscriptionSecretRotated(encrypted_secret=encrypted_secret, previous_until=until)
        for encrypted_secret in ("first", "second")
    ]
    given(subscription.DECIDER, HOOK).when(RotateSecret(encrypted_secret="first", previous_until=until)).then(
        rotated[0]
    )
    first = subscription.DECIDER.fold([HOOK, rotated[0]])
    assert first is not None
    assert (first.encrypted_secret, first.previous_encrypted_secret, first.previous_until) == ("first", None, None)
    second = subscription.DECIDER.fold([HOOK, *rotated])
    assert second is not None
    assert (second.encrypted_secret, second.previous_encrypted_secret, second.previous_until) == (
        "second",
        "first",
        until,
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (CreateSubscription(channel="email", target=" "), "target: must not be blank"),
        (CreateSubscription(channel="email", target="t", audience="x"), "audience: must be one of"),
        (CreateSubscription(channel="email", target="t", min_severity="x"), "min_severity: must be one of"),
    ],
)
def test_subscribing_with_an_invalid_field_names_the_field(command, message):
    given(subscription.DECIDER).when(command).refused(InvalidField, message)
