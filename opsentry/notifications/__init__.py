"""Notify subscribers: deliveries, messages, channels and their transports."""
