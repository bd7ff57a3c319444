"""
A task for each server that something is going to happen to: its first run is long, and has a ``sleep`` beside it.

Later ones, on whatever server is left, are short. Every due time is run, so that the next one is there at once.
"""
