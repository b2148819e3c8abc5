"""Connections to PostgreSQL and Redis, encryption, rate limits, shared look-ups. Nothing here knows the domain."""
