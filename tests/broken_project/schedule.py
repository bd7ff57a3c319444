import no_such_module_of_somebody  # noqa: F401
