"""How does a server stop taking work, and what does it still do? ``base.Drain``, and one module for each kind."""
