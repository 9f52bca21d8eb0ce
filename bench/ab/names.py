"""Names of the two sides, which follow a variant's name and a `#` in records."""

BASE, NEW = "base", "new"
SIDES = (BASE, NEW)


def on(variant: str, side: str) -> str:
    """Name of a variant on a side."""
    return f"{variant}#{side}"
