"""Twenty tasks due every FLEET_PERIOD seconds, counted from 1970: the test picks one that is due in a moment."""
