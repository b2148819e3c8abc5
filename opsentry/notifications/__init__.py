"""Sending what must be told: the ledger of deliveries, the sender, the channels, and what may be dialled."""
