"""Tenants, tokens and rate limits: who may do what, and how often."""
