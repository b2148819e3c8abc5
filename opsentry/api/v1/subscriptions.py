"""`/api/v1/subscriptions`. Targets are personal data: reading needs the scope for writing."""

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from opsentry.api.v1.schemas import CreatedSubscription, RotatedSubscription, Subscription, SubscriptionList
from opsentry.application import subscriptions
from opsentry.application.caller import Permission
from opsentry.application.results import Resource
from opsentry.domain.incident import Severity
from opsentry.domain.subscription import Audience, ChangeSubscription, CreateSubscription, ListedStatus
from opsentry.http.body import NoBody
from opsentry.http.context import RequestContext
from opsentry.http.operation import operation
from opsentry.http.params import Id, NoQuery, PageQuery
from opsentry.http.responses import list_response, resource_response
from opsentry.projections.page_request import PageRequest
from opsentry.projections.subscriptions import SubscriptionPageFilter

_TAG = "Subscriptions"
_COLLECTION = "subscriptions"
_SCOPES: tuple[Permission, ...] = ("write:subscriptions",)


class CreateSubscriptionBody(msgspec.Struct):
    """A new subscription. No `service_ids` means all services."""

    channel: str
    target: str
    audience: Audience = "public"
    notify_incidents: bool = True
    notify_maintenance: bool = True
    service_ids: tuple[Id, ...] = ()
    min_severity: Severity = "informational"


class ChangeSubscriptionBody(msgspec.Struct):
    """The fields to change."""

    target: str | UnsetType = UNSET
    audience: Audience | UnsetType = UNSET
    notify_incidents: bool | UnsetType = UNSET
    notify_maintenance: bool | UnsetType = UNSET
    service_ids: tuple[Id, ...] | UnsetType = UNSET
    min_severity: Severity | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class RotateSecretBody(msgspec.Struct):
    """The hours for which the secret before stays valid."""

    overlap_hours: int = 24


class ListSubscriptionsQuery(PageQuery, kw_only=True):
    """Filters and page of the subscription list."""

    channel: str | None = None
    status: ListedStatus | None = None


@operation("GET", "/api/v1/subscriptions", tag=_TAG, scopes=_SCOPES, result=SubscriptionList, conditional=True)
async def list_subscriptions(context: RequestContext[ListSubscriptionsQuery, NoBody]) -> web.StreamResponse:
    """List subscriptions, the newest first."""
    query = context.query
    page = PageRequest(query.limit, query.offset)
    listing = await subscriptions.list_subscriptions(
        context.application, context.caller, SubscriptionPageFilter(query.channel, query.status), page
    )
    return list_response(context.request, _COLLECTION, listing, page)


@operation(
    "POST",
    "/api/v1/subscriptions",
    tag=_TAG,
    scopes=_SCOPES,
    status=201,
    result=CreatedSubscription,
    idempotent=True,
    example={"channel": "webhook", "target": "https://example.com/hooks/opsentry", "min_severity": "partial_outage"},
)
async def create_subscription(context: RequestContext[NoQuery, CreateSubscriptionBody]) -> web.StreamResponse:
    """Create a subscription.

    A channel that signs its messages returns the signing `secret`, this once.
    """
    command = CreateSubscription(**msgspec.structs.asdict(context.body))
    created = await subscriptions.create_subscription(context.application, context.caller, command)
    resource = created.resource
    if created.secret is not None:
        resource = _with(resource, secret=created.secret)
    return resource_response(resource, status=201, collection=_COLLECTION)


@operation("GET", "/api/v1/subscriptions/{id}", tag=_TAG, scopes=_SCOPES, result=Subscription, conditional=True)
async def get_subscription(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Get a subscription."""
    return resource_response(await subscriptions.get_subscription(context.application, context.caller, context.id))


@operation(
    "PATCH",
    "/api/v1/subscriptions/{id}",
    tag=_TAG,
    scopes=_SCOPES,
    result=Subscription,
    idempotent=True,
    conditional=True,
    errors=(409,),
    example={"min_severity": "major_outage"},
)
async def change_subscription(context: RequestContext[NoQuery, ChangeSubscriptionBody]) -> web.StreamResponse:
    """Change a subscription."""
    command = ChangeSubscription(**msgspec.structs.asdict(context.body))
    changed = await subscriptions.change_subscription(context.application, context.caller, context.id, command)
    return resource_response(changed)


@operation(
    "DELETE",
    "/api/v1/subscriptions/{id}",
    tag=_TAG,
    scopes=_SCOPES,
    status=204,
    idempotent=True,
    conditional=True,
)
async def remove_subscription(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Remove a subscription. Its target is erased from the ledger."""
    removed = await subscriptions.remove_subscription(context.application, context.caller, context.id)
    return resource_response(removed, status=204)


@operation(
    "POST",
    "/api/v1/subscriptions/{id}/test",
    tag=_TAG,
    scopes=_SCOPES,
    status=202,
    result=Subscription,
    idempotent=True,
    conditional=True,
    errors=(409,),
)
async def test_subscription(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Send a test message."""
    requested = await subscriptions.request_test(context.application, context.caller, context.id)
    return resource_response(requested, status=202)


@operation(
    "POST",
    "/api/v1/subscriptions/{id}/rotate-secret",
    tag=_TAG,
    scopes=_SCOPES,
    result=RotatedSubscription,
    body_optional=True,
    idempotent=True,
    conditional=True,
    errors=(409,),
    example={"overlap_hours": 24},
)
async def rotate_secret(context: RequestContext[NoQuery, RotateSecretBody]) -> web.StreamResponse:
    """Rotate the signing secret; the one before stays valid for `overlap_hours`."""
    rotated = await subscriptions.rotate_secret(
        context.application, context.caller, context.id, context.body.overlap_hours
    )
    return resource_response(
        _with(rotated.resource, secret=rotated.secret, previous_valid_until=rotated.previous_valid_until)
    )


def _with(resource: Resource, **more: object) -> Resource:
    return resource._replace(body=resource.body[:-1] + b"," + msgspec.json.encode(more)[1:])


OPERATIONS = (
    list_subscriptions,
    create_subscription,
    get_subscription,
    change_subscription,
    remove_subscription,
    test_subscription,
    rotate_secret,
)
