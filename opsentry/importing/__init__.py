"""Bringing in history from elsewhere."""
