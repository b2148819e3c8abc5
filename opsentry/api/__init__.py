"""The HTTP API: routes, what is read from requests, and one file for each resource. No SQL."""
