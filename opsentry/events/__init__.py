"""The tenant's log: its codec, its hash chain, appending to it and reading from it. Nothing else touches `events`."""
