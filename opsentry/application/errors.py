"""Refusals of use cases, and those of the ledger that entry points explain."""

from opsentry.events.command_handler import ConcurrencyConflict, IdempotencyKeyReused, NameReserved

__all__ = ["ConcurrencyConflict", "IdempotencyKeyReused", "NameReserved", "NotFound", "PreconditionFailed"]


class NotFound(Exception):
    """The tenant has no such resource. A resource of another tenant gives the same answer."""


class PreconditionFailed(Exception):
    """The resource has none of the versions that the caller expects; nothing was changed."""

    def __init__(self, etag: str) -> None:
        super().__init__("If-Match: the resource has changed; read it again and repeat the request")
        self.etag = etag
        """The inside of the resource's present entity tag."""
