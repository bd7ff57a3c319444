"""Twenty tasks with one open due time each, whenever the test is run: the first of January."""
