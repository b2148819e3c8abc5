"""Tenants and tokens: the owners of ledgers, and the credentials that open them."""
