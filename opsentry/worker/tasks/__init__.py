"""The periodic tasks of a worker, one per module."""
