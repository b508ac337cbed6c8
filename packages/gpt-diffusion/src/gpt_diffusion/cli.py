"""Command line of gpt-diffusion."""


def main() -> int:
    """Run the command line."""
    return 0
