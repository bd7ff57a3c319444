"""
The lock in Redis or Valkey: a hash per task, and Lua steps that are each atomic and by the server's own clock.

    lock        what does each call of a lock ask of the store, and what does it make of the answer?
    steps.lua   what happens in the server, each step as a whole?
    line        how does a step get to the primary, and what do its errors mean?
    mend        what is to be written, after a loss or a new version? (Pure.)
    rows        how is a row a list of texts? (Pure.)

Each step of a pass is one round trip, whatever the number of tasks, and a look reads only what is due. A loss of data,
whole or partial, and a restart of the server are noticed: claims are then held back for a lease, so that owners that
live can come back. What became of the due times that a flush, an eviction or a fail-over has lost, nobody can know.
"""

from __future__ import annotations

from .lock import RedisLock

__all__ = ["RedisLock"]
