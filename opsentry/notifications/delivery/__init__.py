"""Deliver messages: enqueue intents, lease endpoints, attempt deliveries, retry them and record the results."""
