"""The results of use cases: rendered resources and lists, with the ledger position that they show."""

from typing import NamedTuple


class Resource(NamedTuple):
    """One resource as JSON.

    Attributes:
        id: The resource's id within its tenant.
        body: The JSON; empty for a removed resource.
        etag: The inside of its entity tag; `None` where the octets must serve.
        position: The ledger position that it shows.
        lag_events: How many events the body lacks.
        replayed: True if an earlier request with the same idempotency key ran the command.
    """

    id: int
    body: bytes
    etag: str | None
    position: int
    lag_events: int = 0
    replayed: bool = False


class Listing(NamedTuple):
    """A list of resources.

    Attributes:
        items: The inside of a JSON array.
        total: The number of entries on all pages; `None` where there are no pages.
        position: The ledger position that it shows.
        lag_events: How many events the list lacks.
        tag: A text that changes with the list; `None` where the octets must serve.
    """

    items: bytes
    total: int | None
    position: int
    lag_events: int = 0
    tag: str | None = None
