"""
What happens to servers, for anybody who listens. All are sent with ``send_robust``, after the row was committed.

The sender is the class ``Server``; each comes with ``server`` (the row), ``previous`` (its status until then) and
``reason`` (a sentence). What a receiver raises is logged, and changes nothing else.
"""

from __future__ import annotations

from django.dispatch import Signal

# Sent before the provider is called.
creating_server = Signal()
draining_server = Signal()
stopping_server = Signal()
deleting_server = Signal()
rebooting_server = Signal()

# Sent when the provider has said so.
server_running = Signal()
server_stopped = Signal()
server_deleted = Signal()

server_errored = Signal()
server_hanging = Signal()

# A machine that bears our tag, and had no row. It has one by now: ``server``.
orphan_found = Signal()

# More is wanted than may be had. provider: str · type: str · reason: str; ``server`` is None, or the row that waits.
server_limit_hit = Signal()
