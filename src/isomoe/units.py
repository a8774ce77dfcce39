"""Quantities in few characters."""


def scaled(value: float, unit: str) -> str:
    """Three digits, such as 59.2 GB."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
