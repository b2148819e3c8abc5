"""Query tables built from the log: one file for each read model, with what writes it and what reads it."""
