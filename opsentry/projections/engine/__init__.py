"""The engine of all projections: catching up, freshness, replay, rebuild, comparison, management."""
