"""The command line: one file for each group of commands. Exit codes: 0 done, 1 failed, 2 wrong use."""
