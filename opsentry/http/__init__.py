"""HTTP: declared operations and the one way in which a request is served. Knows no resource."""
