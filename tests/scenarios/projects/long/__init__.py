"""Runs of three leases: one that waits, one that holds the GIL in C, and one that is not let go on so long."""
