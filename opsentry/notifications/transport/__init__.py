"""Connections to the outside: HTTP and SMTP, with the egress filter."""
