"""Command line of ghn."""


def main() -> int:
    """Run the command line."""
    return 0
