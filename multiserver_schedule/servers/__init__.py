"""
Worker servers that come and go with the load. An app of its own, which the scheduler knows nothing of:

    load → demand → plan → reconcile → provider

``from multiserver_schedule.servers import fleet`` is what projects call.
"""
