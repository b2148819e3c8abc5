"""What incidents, maintenance windows, services and subscriptions are and how they change. Pure: no clock, no I/O."""
