"""Who writes the letters: as many servers as the queue needs."""

from datetime import timedelta

from django.conf import settings

from multiserver_schedule.servers.drains.term import TermDrain
from multiserver_schedule.servers.fleet import ServerType, register_server_type
from multiserver_schedule.servers.load.django_tasks import DjangoTasksQueue

register_server_type(
    ServerType("writer")
    .between(settings.FLOOD_LEAST, settings.FLOOD_MOST)
    .scale_on(DjangoTasksQueue("default"), waiting_per_server=20)
    .stabilization(down=timedelta(seconds=3))
    .cool_down(down=timedelta(seconds=2))
    .step(down=1)
    .drain_with(TermDrain(), limit=timedelta(seconds=30))
)
