"""Command line of zoo-common."""


def main() -> int:
    """Run the command line."""
    return 0
