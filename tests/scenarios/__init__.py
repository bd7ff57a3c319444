"""
What the tests of the keeper's promises have in common besides the fleet: projects, and a closer look at processes.

``scene`` is a fleet whose servers run ``projects/<name>/schedule.py`` of this package, with ``settings`` on top of the
fleet's. What their tasks do that the fleet's do not is in ``deeds``.
"""
