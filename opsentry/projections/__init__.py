"""Read models: rows derived from the ledger, one file for each, which both writes and reads them."""
