"""A project with a task of every second, and a provider that takes its time."""
