"""The project's own tasks: what belongs to no app."""

import sys

from multiserver_schedule import schedule

schedule.command("clearsessions").daily_at("03:00").name("project.clear_sessions")

# A program, started directly: a list, no shell.
schedule.exec([sys.executable, "-c", "import platform; print(platform.node())"]).every_fifteen_minutes().name(
    "project.say_hostname"
)

# Each server its own: clearing a temp folder, rotating a local log.
schedule.call("example.tasks.sweep_temp_files").every_minute().on_every_server().name("project.sweep_temp_files")
