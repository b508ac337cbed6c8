"""Command line of pilimit."""


def main() -> int:
    """Run the command line."""
    return 0
