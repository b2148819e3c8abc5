"""The worker process: catches projections up, rebuilds them, and runs schedules."""
