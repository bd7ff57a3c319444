"""A small schedule that the tests of commands, logs and helpers share."""

from __future__ import annotations

import sys

from multiserver_schedule import schedule

schedule.call("tests.shop.work.note", "digest").daily_at("09:00").name("shop.digest")
schedule.call("tests.shop.work.fail").daily_at("10:00").name("shop.broken")
schedule.call("tests.shop.work.asynchronous").daily_at("11:00").name("shop.asynchronous")
schedule.call("tests.shop.work.note", "never").daily_at("09:00").when("tests.shop.work.no").name("shop.filtered")
SAY_NAME = "import os; print(os.environ['MULTISERVER_SCHEDULE_NAME'])"
schedule.exec([sys.executable, "-c", SAY_NAME]).daily_at("12:00").name("shop.program")
schedule.command("check", "--tag=models").daily_at("13:00").name("shop.command")
schedule.call("tests.shop.work.note", "here").daily_at("14:00").on_every_server().name("shop.here")
