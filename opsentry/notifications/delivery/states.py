"""Define the states of a delivery and the transitions between them."""

from collections.abc import Mapping

# A final delivery returns to `pending` on request. The message of a coalesced one belongs to another delivery.
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "pending": frozenset({"delivered", "coalesced", "withheld", "exhausted", "cancelled", "disabled"}),
    "delivered": frozenset({"pending"}),
    "coalesced": frozenset(),
    "suppressed": frozenset({"pending"}),
    "withheld": frozenset({"pending"}),
    "exhausted": frozenset({"pending", "cancelled"}),
    "cancelled": frozenset({"pending"}),
    "disabled": frozenset({"pending"}),
}
STATES = tuple(TRANSITIONS)
# An intent that a maintenance window holds back becomes a suppressed delivery at once.
INITIAL_STATES = frozenset({"pending", "suppressed"})


def states_before(state: str) -> tuple[str, ...]:
    """Return the states from which a delivery can move to `state`."""
    return tuple(origin for origin, following in TRANSITIONS.items() if state in following)


REDELIVERABLE_STATES = states_before("pending")
CANCELLABLE_STATES = states_before("cancelled")
# Many deliveries at once: those that reached nobody. A pending one is attempted now instead of at its time.
RETRYABLE_STATES = ("exhausted", "cancelled", "disabled", "withheld", "pending")
