"""A task for each of FLEET_TASKS, every FLEET_PERIOD seconds, which its own server and the healthy one may run."""
