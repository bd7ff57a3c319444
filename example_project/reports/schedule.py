"""The reports' tasks."""

from multiserver_schedule import schedule

schedule.command("nightly_report", "--days=1").daily_at("02:30").timezone("Europe/Berlin").weekdays()


@schedule.task().hourly().between("08:00", "18:00")
def refresh_dashboard() -> None:
    """Recompute what the dashboard shows, in working hours."""
