"""Projections in general: applying events, freshness, rebuilds, comparison, management."""
