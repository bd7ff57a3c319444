"""Three tasks of a minute and up: a short one, a slow one with a grandchild, and one that fails."""
