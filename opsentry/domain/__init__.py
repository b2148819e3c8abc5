"""The pure domain: aggregates as deciders, redaction plans and uptime, without clock, I/O or randomness."""
