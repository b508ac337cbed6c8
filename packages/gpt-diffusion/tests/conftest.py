import pytest
import torch
from gpt_diffusion.model import GptModel
from support.golden import fill


@pytest.fixture
def build_model():
    """A model of a golden's config, built without drawing its initial weights."""

    def build(config):
        keys = ["split_policy", "chunk_size", "n_layer", "n_head", "n_embd", "num_frequencies", "max_freq_log2"]
        keys += ["absolute_loss_conditioning", "encoder_depth", "decoder_depth"]
        with torch.device("meta"):
            model = GptModel(config["parameter_sizes"], **{k: config[k] for k in keys if k in config})
        return model.to_empty(device="cpu").eval()

    return build


@pytest.fixture
def filled_model(build_model):
    """The same with the weights of the goldens' recipe."""

    def build(config):
        model = build_model(config)
        count, largest = config["num_frequencies"], config["max_freq_log2"]
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if key == "scalar_embedder.frequencies":
                    tensor.copy_(2.0 ** (torch.arange(count, dtype=torch.float64) * largest / (count - 1)))
                elif ".ln" in key and key.endswith("weight"):
                    tensor.copy_(1 + fill(key, tensor.shape, 0.1))
                else:
                    tensor.copy_(fill(key, tensor.shape, 0.02))
        return model

    return build


@pytest.fixture(scope="session")
def digits_zoo(tmp_path_factory):
    """A zoo of 40 short runs on the digits; read only."""
    from gpt_diffusion import generate

    path = tmp_path_factory.mktemp("data") / "zoo"
    options = {"runs": 40, "steps": 40, "save_count": 8, "split": (0.7, 0.15, 0.15)}
    generate("digits_loss", path, strategy="stacked", progress=False, **options)
    return path


@pytest.fixture
def tiny_config(digits_zoo, tmp_path):
    """The preset digits_loss, cut down to seconds."""
    from gpt_diffusion import load_config

    def build(*overrides):
        small = [f"dataset.path={digits_zoo}", f"out_dir={tmp_path}", "dataset.target_epoch_size=128"]
        small += ["transformer.n_embd=16", "transformer.n_layer=1", "transformer.n_head=2"]
        small += ["train.max_steps=12", "train.mb_size=8", "train.log_freq=3", "train.checkpoint_steps=4"]
        small += ["sampling.steps=3", "vis.num_nets_per_gpu=2", "vis.dvo_steps=4"]
        return load_config("digits_loss", [*small, *overrides])

    return build
