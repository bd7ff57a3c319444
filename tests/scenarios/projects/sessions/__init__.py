"""A task that says which sessions of PostgreSQL it and its parents have."""
