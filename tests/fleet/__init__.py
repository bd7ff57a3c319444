"""
Real ``runschedule`` processes on a real store, what can be done to them, and a checker of what they left behind.

    with Fleet(store, tmp_path, project="steady") as fleet:      # from tests.fleet.harness import Fleet
        fleet.register()
        fleet.make_due()
        web1 = fleet.server("web1")
        fleet.wait_for(lambda: fleet.journal.of("start"), "a run to start")
        web1.kill()
        ...

``harness`` starts, stops and kills; ``journal`` is the append-only log that tasks, receivers and tests write;
``checker`` reads journal and tables, and nothing else. ``drill`` keeps services and a cron going and does things to
them, and ``promises`` reads what came of it. ``naive``, ``careless`` and ``faulty`` are locks that have to be found
out. What the servers declare is in ``projects/<name>/schedule.py``.
This package is also an installed app of theirs (``apps``: receivers and SQLite's clock), so nothing is imported here.
"""
