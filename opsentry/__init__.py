"""Opsentry: incidents, maintenance and service status, event-sourced on PostgreSQL."""

__version__ = "0.1.0"
