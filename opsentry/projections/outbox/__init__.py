"""The outbox: notification intents that rules derive from the ledger."""
