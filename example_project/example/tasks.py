"""What the project's own schedule.py calls."""

import tempfile
import time
from pathlib import Path


def sweep_temp_files(older_than_hours: int = 24) -> None:
    """Delete this example's own old files from the machine's temp folder."""
    limit = time.time() - older_than_hours * 3600
    for path in Path(tempfile.gettempdir()).glob("multiserver_schedule_example_*"):
        if path.stat().st_mtime < limit:
            path.unlink(missing_ok=True)
