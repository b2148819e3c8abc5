"""Run everything in one process on embedded servers, with example tenants."""
