"""The part of a list that a caller asks for, now and as of a position alike."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class PageRequest(NamedTuple):
    """A page of a list.

    Attributes:
        limit: The number of items on the page at most; `None` for all of them.
        offset: The number of items that come before the page.
    """

    limit: int | None
    offset: int = 0

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Return this page of `items`, which are in the list's order."""
        return items[self.offset :] if self.limit is None else items[self.offset : self.offset + self.limit]


ALL_ITEMS = PageRequest(limit=None)
"""The page that holds the whole list."""
