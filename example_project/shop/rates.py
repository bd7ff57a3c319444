"""Exchange rates of an imaginary bank."""


def refresh(base: str) -> None:
    """Print what would be fetched."""
    print(f"1 {base} = 1.09 USD")
