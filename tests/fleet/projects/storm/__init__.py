"""Due every few seconds, each task of another nature; ``tests/test_fleet_faults.py`` tells the checker the same."""
