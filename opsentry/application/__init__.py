"""The use cases. Every change and query of every entry point goes through here."""
