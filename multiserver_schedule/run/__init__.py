"""RUN: a process for each run, a runner that ends what must end, and nothing that touches the store."""
