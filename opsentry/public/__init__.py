"""Serve the pages for people without an account: sign-up by email, confirmation and unsubscribing."""
