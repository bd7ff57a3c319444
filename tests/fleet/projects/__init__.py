"""What the servers of a fleet declare, a package for each scenario."""
