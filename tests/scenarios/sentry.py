"""A transport of Sentry's SDK that writes each event as a line of a file."""

from __future__ import annotations

import json
import os
from typing import Any

from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport


class ToFile(Transport):
    """Keeps what would have been sent."""

    def capture_envelope(self, envelope: Envelope) -> None:
        """Write the events among its items."""
        for item in envelope.items:
            event: Any = item.get_event()
            if event is not None:
                line = {"pid": os.getpid(), "event": event}
                with open(os.environ["SCENE_SENTRY"], "a") as file:
                    file.write(json.dumps(line, default=str) + "\n")
