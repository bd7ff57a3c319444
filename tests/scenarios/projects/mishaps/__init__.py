"""A task for each way to end badly, and two that are well."""
