"""The library against its peers, and its own versions against each other: `__main__` runs it.

A suite is a module with functions that return rows of plain values; tables.py prints the rows of a
record. torch_peers.py runs in a process of its own (`peers`), the rest in this one.
"""
