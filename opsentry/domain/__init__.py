"""Incidents, maintenance windows, services and subscriptions, as pure functions: no clock, no I/O."""
