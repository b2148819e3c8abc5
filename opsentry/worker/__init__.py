"""What nobody waits for: projections that fell behind, and windows whose hour has come. Any number may run."""
