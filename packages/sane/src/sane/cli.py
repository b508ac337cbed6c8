"""Command line of sane."""


def main() -> int:
    """Run the command line."""
    return 0
