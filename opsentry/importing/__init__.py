"""Read the exports of other products and translate their records into events."""
