"""Deliveries: enqueue intents, lease endpoints, send, retry, record."""
