"""A small zoo, prepared, and an autoencoder trained on it for a moment."""

import pytest
from sane.config import load_config
from sane.model import load_model
from sane.preparation import PrepareConfig, prepare
from sane.pretraining import pretrain
from support.autoencoders import CNN, SIZES, TRAINING, zoo_of_networks


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """Folder with ``zoo``, ``prepared.safetensors`` and ``results/small``."""
    folder = tmp_path_factory.mktemp("workshop")
    config = {**CNN, "dataset::name": "digits"}
    zoo = zoo_of_networks(folder / "zoo", config, runs=14, checkpoints=3)
    prepare(zoo, PrepareConfig(token_size=40)).save(folder / "prepared.safetensors")
    settings = [f"prepared={folder}/prepared.safetensors", f"out_dir={folder}/results", *SIZES, *TRAINING]
    pretrain(load_config("small", settings), quiet=True)
    return folder


@pytest.fixture
def model(workshop):
    return load_model(workshop / "results" / "small")
