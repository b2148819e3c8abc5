"""Define the states that a projection has for a tenant, and the transitions between them."""

from collections.abc import Mapping

# A pause hides a halt: a projection that was halted before is halted again when it is resumed.
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "running": frozenset({"halted", "paused"}),
    "halted": frozenset({"running", "paused"}),
    "paused": frozenset({"running", "halted"}),
}

# The state of checkpoint `c`, whose projection `p` may not be registered yet.
STATE = """
CASE WHEN coalesce(p.paused, false) THEN 'paused' WHEN c.halted_at IS NOT NULL THEN 'halted' ELSE 'running' END
"""
