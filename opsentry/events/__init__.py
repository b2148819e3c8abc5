"""The event store: append to ledgers, read them, verify and export them. Nothing else writes `events`."""
