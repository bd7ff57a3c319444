"""What the servers of a scene declare, a package for each."""
