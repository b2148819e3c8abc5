"""`opsentry demo`: everything in one process on embedded servers, with something in it to look at."""
