"""Services: register, change and retire the things that incidents and maintenance windows affect."""

import re
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias, assert_never, get_args

import msgspec
from msgspec import UNSET, UnsetType

from opsentry.domain.decider import (
    Decider,
    Event,
    IllegalTransition,
    InvalidField,
    check_choice,
    check_text,
    check_title,
    set_fields,
)
from opsentry.domain.visibility import VISIBILITIES

KIND = "service"

# Derived from incidents and maintenance windows; see `uptime.service_status`.
ServiceStatus: TypeAlias = Literal[
    "operational", "degraded_performance", "partial_outage", "major_outage", "under_maintenance"
]

STATUSES: tuple[ServiceStatus, ...] = get_args(ServiceStatus)
MAX_TAGS = 50
SLUG = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def slug_reservation(slug: str) -> str:
    """Return the reservation that keeps a slug unique among the tenant's services."""
    return f"service:{slug}"


# ---------------------------------------------------------------------------------------------------- events


class ServiceRegistered(Event, frozen=True, kw_only=True):
    """A service was registered. Its uptime counts from the time at which this occurred."""

    TYPE: ClassVar[str] = "service.registered"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"description"})
    slug: str
    name: str
    description: str | None = None
    visibility: str
    tags: tuple[str, ...] = ()


class ServiceChanged(Event, frozen=True, kw_only=True):
    """The service's description changed. Fields that are `UNSET` keep their values."""

    TYPE: ClassVar[str] = "service.changed"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"description"})
    name: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    visibility: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET


class ServiceRetired(Event, frozen=True, kw_only=True):
    """The service left the lists. Its history stays."""

    TYPE: ClassVar[str] = "service.retired"


ServiceEvent: TypeAlias = ServiceRegistered | ServiceChanged | ServiceRetired


# ---------------------------------------------------------------------------------------------------- state


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """Hold a service's present state."""

    slug: str
    name: str
    description: str | None
    visibility: str
    tags: tuple[str, ...]
    retired: bool = False


def evolve(state: Service | None, event: ServiceEvent) -> Service:
    """Apply one event to the state."""
    if isinstance(event, ServiceRegistered):
        return Service(
            slug=event.slug,
            name=event.name,
            description=event.description,
            visibility=event.visibility,
            tags=event.tags,
        )
    if state is None:
        raise ValueError(f"{event.TYPE} before {ServiceRegistered.TYPE}")
    match event:
        case ServiceChanged():
            return msgspec.structs.replace(state, **set_fields(event))
        case ServiceRetired():
            return msgspec.structs.replace(state, retired=True)
        case _:
            assert_never(event)


# ---------------------------------------------------------------------------------------------------- commands


class RegisterService(msgspec.Struct, frozen=True, kw_only=True):
    """Register a service under a slug."""

    slug: str
    name: str
    description: str | None = None
    visibility: str = "public"
    tags: tuple[str, ...] = ()


class ChangeService(msgspec.Struct, frozen=True, kw_only=True):
    """Change the given fields. Fields that are `UNSET` keep their values."""

    name: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    visibility: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET


class RetireService(msgspec.Struct, frozen=True):
    """Remove a service from the lists."""


ServiceCommand: TypeAlias = RegisterService | ChangeService | RetireService


def decide(state: Service | None, command: ServiceCommand) -> Sequence[ServiceEvent]:
    """Return the events that `command` causes; raise `InvalidField` or `IllegalTransition` if it is refused."""
    if isinstance(command, RegisterService):
        if state is not None:
            raise IllegalTransition("the service exists already")
        if not SLUG.fullmatch(command.slug):
            raise InvalidField("slug", "must be 1 to 63 of a-z, 0-9 and -, with no - at either end")
        return [
            ServiceRegistered(
                slug=command.slug,
                name=check_title("name", command.name),
                description=check_text("description", command.description),
                visibility=check_choice("visibility", command.visibility, VISIBILITIES),
                tags=_check_tags(command.tags),
            )
        ]
    if state is None or state.retired:
        raise IllegalTransition("the service does not exist")
    match command:
        case ChangeService():
            return _change(state, command)
        case RetireService():
            return [ServiceRetired()]
        case _:
            assert_never(command)


def _change(state: Service, command: ChangeService) -> list[ServiceEvent]:
    changed: dict[str, object] = {}
    if command.name is not UNSET and check_title("name", command.name) != state.name:
        changed["name"] = command.name
    if command.description is not UNSET and check_text("description", command.description) != state.description:
        changed["description"] = command.description
    if command.visibility is not UNSET:
        check_choice("visibility", command.visibility, VISIBILITIES)
        if command.visibility != state.visibility:
            changed["visibility"] = command.visibility
    if command.tags is not UNSET and _check_tags(command.tags) != state.tags:
        changed["tags"] = command.tags
    return [msgspec.convert(changed, ServiceChanged)] if changed else []


def _check_tags(tags: Sequence[str]) -> tuple[str, ...]:
    if len(tags) > MAX_TAGS:
        raise InvalidField("tags", f"must be at most {MAX_TAGS}")
    return tuple(check_title("tags", tag) for tag in tags)


DECIDER: Decider[Service, ServiceCommand, ServiceEvent] = Decider(kind=KIND, evolve=evolve, decide=decide)
