"""The ``pilimit`` command."""

from collections.abc import Sequence

from zoo_common.command import run_command

DESCRIPTION = """Infinite-width networks that learn features, and their finite twins.

This version holds no features yet. Planned commands:
  pilimit train TASK                 train an infinite-width or finite network
  pilimit eval, pilimit transfer     judge its features by their kernel, or on another task
  pilimit maml                       meta-learning on Omniglot
  pilimit kernel                     NNGP and NTK limits
  pilimit sample                     a finite network from an infinite one
  pilimit convert, pilimit sweep
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("pilimit", DESCRIPTION, {}, argv)
