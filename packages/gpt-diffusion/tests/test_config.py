import pytest
from gpt_diffusion.config import PRESETS, Config, config_from_dict, config_to_yaml, load_config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name, tmp_path):
    config = load_config(name)
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_reach_nested_keys_with_the_right_types():
    overrides = ["train.base_lr=1e-3", "train.max_steps=null", "exp_name=7", "dataset.augment=false"]
    config = load_config("digits_loss", overrides)
    assert (config.train.base_lr, config.train.max_steps) == (1e-3, None)
    assert (config.exp_name, config.dataset.augment) == ("7", False)
    assert config.train.mb_size == 64  # the other keys of the preset stay


def test_an_empty_tree_is_the_published_default():
    assert config_from_dict({}) == Config()
    assert Config().transformer.tokens == "layers"
    assert Config().train.behaviour_weight == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.mb_sizes=3"], "unknown configuration key 'train.mb_sizes'; did you mean 'train.mb_size'"),
        (["trian.mb_size=3"], "unknown configuration key 'trian'; did you mean 'train'"),
        (["train.mb_size=lots"], "train.mb_size: expected int, got 'lots'"),
        (["train.mb_size=true"], "train.mb_size: expected int, got True"),
        (["train.base_lr=fast"], "train.base_lr: expected float, got 'fast'"),
        (["train.mb_size=0"], "train.mb_size must be at least 1, got 0"),
        (["train.max_steps=-5"], "train.max_steps must be at least 1, got -5"),
        (["transformer.tokens=words"], "transformer.tokens: expected one of layers, units, got 'words'"),
        (["sampling.steps=1001"], "sampling.steps must be at most 1000, got 1001"),
        (["exp_name=../up"], "exp_name must be a plain folder name, got '../up'"),
        (["train=3"], "train.: expected a group of keys, got 3"),
        (["train.mb_size"], "must have the form key=value"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match="(?s)" + __import__("re").escape(message)):
        load_config("digits_loss", overrides)


def test_unknown_configurations_and_broken_files_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="'digits_los' is neither a file nor built in; did you mean 'digits_loss'"
    ):
        load_config("digits_los")
    (tmp_path / "bad.yaml").write_text("train: [unclosed")
    with pytest.raises(ValueError, match=r"bad\.yaml: not a YAML file"):
        load_config(tmp_path / "bad.yaml")
