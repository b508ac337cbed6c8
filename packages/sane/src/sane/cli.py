"""The ``sane`` command."""

from collections.abc import Sequence

from zoo_common.command import run_command

DESCRIPTION = """Sequential autoencoder of neural network weights: embed, analyse and sample models.

This version holds no features yet. Planned commands:
  sane zoo train, sane zoo inspect   make a zoo of models
  sane align, sane preprocess        bring its models to one canonical form
  sane pretrain                      train the autoencoder
  sane embed, sane predict           embeddings, and model properties from them
  sane sample, sane finetune         new models, and how they train on
  sane analyse, sane report          layer-wise analysis and a report card of a model
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("sane", DESCRIPTION, {}, argv)
