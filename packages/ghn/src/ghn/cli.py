"""The ``ghn`` command."""

from collections.abc import Sequence

from zoo_common.command import run_command

DESCRIPTION = """Graph hypernetworks: predict all parameters of a PyTorch model in one forward pass.

This version holds no features yet. Planned commands:
  ghn predict MODEL -o FILE          predict the weights of a model
  ghn check MODEL                    which parameter is set by what
  ghn graph MODEL                    draw the computational graph
  ghn generate SPLIT N DIR           make DeepNets-1M architectures
  ghn train, ghn eval                train and judge a hypernetwork
  ghn train-net, ghn eval-net        train and judge one network, with or without predicted weights
  ghn detect, ghn properties, ghn search
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("ghn", DESCRIPTION, {}, argv)
