"""
How much work waits? One module for each kind of queue, which imports its library; ``base`` is what they share.

Each has a class whose objects are sources: ``scale_on(CeleryQueue("default"))`` asks one each minute, and a callable of
yours may ask it as well, here for how long work has waited, with django-tasks-db in a ``schedule.py``::

    from datetime import timedelta
    from multiserver_schedule.servers import fleet
    from multiserver_schedule.servers.load.django_tasks import DjangoTasksQueue

    @fleet.determine_server_count
    def by_waiting_time(fleet):
        waited = DjangoTasksQueue("default").load().oldest
        return 3 if waited > timedelta(minutes=5) else 2 if waited > timedelta(minutes=1) else 1

Every time is a timedelta. What can't be reached raises within some seconds; the count then stays as it is.
"""
