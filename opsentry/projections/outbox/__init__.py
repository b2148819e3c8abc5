"""The outbox: notification intents, derived from the ledger by rules."""
