import dataclasses

import pytest
from gpt_diffusion.config import PRESETS, Config, config_from_dict, config_to_yaml, load_config
from gpt_diffusion.dataset import pairs_per_epoch

NAMES = ["mnist_loss", "mnist_error", "cifar10_loss", "cifar10_error", "cartpole"]

# The specification, written out: what all ten files share, and one row for each key in which they differ.
COMMON = """
amp False; rng_seed 0; num_gpus 1; debug_mode False; dataset.augment True; dataset.normalizer openai
dataset.max_train_runs 1000000; dataset.num_workers 1; vis.use_ema True; vis.dvo_steps 20; sampling.thresholding none
transformer.ema True; transformer.absolute_loss_conditioning True; transformer.predict_xstart True
transformer.max_freq_log2 14; transformer.num_frequencies 128; transformer.encoder_depth 1; transformer.decoder_depth 1
transformer.n_layer 12; transformer.dropout_prob 0.0; train.ema_decay 0.9999; train.beta2 0.999
train.warmup_factor 0.0; train.lr_sch cos; train.wd 0.1; test.use_ema False; wandb.name None; wandb.group default
wandb.project Gpt; wandb.entity learn2learn; wandb.mode online
"""
ROWS = """
exp_name                  | mnist_loss | mnist_error | cifar10_loss | cifar10_error | cartpole
dataset.name              | mnist_loss | mnist_error | cifar10_loss | cifar10_error | cartpole
dataset.train_metric      | avg_test_loss | avg_test_err | avg_test_loss | avg_test_err | train_ret
dataset.path              | mnist | mnist | cifar10 | cifar10 | cartpole
dataset.num_test_runs     | 500 | 500 | 2050 | 2050 | 2050
dataset.openai_coeff      | 4.185 | 4.185 | 1.646 | 1.646 | 2.06
dataset.target_epoch_size | 100800 | 100800 | 100800 | 100800 | 806400
vis.freq                  | 20 | 20 | 20 | 20 | 10
vis.num_nets_per_gpu      | 8 | 8 | 16 | 16 | 8
vis.net_mb_size_per_gpu   | 8 | 8 | 16 | 16 | 8
vis.prompt_start_coeff    | 0.9 | 0.9 | 1.0 | 1.0 | 1.0
transformer.split_policy  | chunk_within_layer | chunk_within_layer | chunk_within_layer | chunk_within_layer | layer_by_layer
transformer.chunk_size    | 1000 | 1000 | 576 | 576 | 2048
transformer.n_embd        | 1536 | 1536 | 2048 | 2048 | 1536
transformer.n_head        | 16 | 16 | 16 | 16 | 12
train.grad_clip           | 0.75 | 0.75 | 0.1 | 0.1 | 0.0
train.warmup_epochs       | 5 | 5 | 5 | 5 | 10
train.base_lr             | 4e-4 | 4e-4 | 4e-4 | 4e-4 | 2e-4
train.num_ep              | 2000 | 2000 | 15000 | 15000 | 2000
train.mb_size             | 1024 | 512 | 550 | 550 | 8192
test.mb_size              | 1024 | 512 | 550 | 550 | 8192
train.checkpoint_freq     | 250 | 250 | 500 | 500 | 500
test.freq                 | 20 | 10 | 10 | 10 | 10
out_dir                   | results | results | results | results | results
resume_path               | None | None | None | None | None
test_only                 | False | False | False | False | False
vis.recursive_probe       | False | False | False | False | False
"""
TEST_ROWS = """
vis.num_nets_per_gpu      | 16 | 16 | 32 | 128 | 16
vis.net_mb_size_per_gpu   | 16 | 16 | 32 | 64 | 16
train.mb_size             | 1024 | 512 | 500 | 550 | 8192
test.mb_size              | 1024 | 512 | 500 | 550 | 8192
out_dir                   | test_results | test_results | test_results | test_results | test_results
resume_path               | mnist_loss.pt | mnist_error.pt | cifar10_loss.pt | cifar10_error.pt | cartpole.pt
test_only                 | True | True | True | True | True
vis.recursive_probe       | True | True | True | True | True
"""


def written_out(name, test):
    """Every key of one published file."""
    pairs = [entry.split() for line in COMMON.strip().splitlines() for entry in line.split("; ")]
    table = {key: value for key, value in pairs}
    for row in (ROWS + (TEST_ROWS if test else "")).split("\n"):
        if row:
            key, *values = (cell.strip() for cell in row.split("|"))
            table[key] = values[NAMES.index(name)]
    table["dataset.path"] = f"checkpoint_datasets/{table['dataset.path']}"
    return table


def different(a, b, prefix=""):
    """Dotted keys in which two trees differ."""
    keys = {key for key in a if a[key] != b[key]}
    groups = {key for key in keys if isinstance(a[key], dict)}
    return {prefix + key for key in keys - groups}.union(*(different(a[g], b[g], f"{g}.") for g in groups))


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_ten_published_files_are_presets(name, test):
    config = load_config(f"{name}_test" if test else name)
    for key, text in written_out(name, test).items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        assert str(value) == text or (isinstance(value, (int, float)) and value == float(text)), key
    others = {row.split("|")[0].strip() for row in TEST_ROWS.strip().splitlines()} if test else set()
    assert different(dataclasses.asdict(load_config(name)), dataclasses.asdict(config)) <= others
    assert load_config(f"configs/{'test' if test else 'train'}/{name}.yaml") == config


@pytest.mark.parametrize(
    ("name", "runs", "iterations", "total"),
    [
        ("mnist_loss", 10728, 89, 178_000),
        ("mnist_error", 10728, 179, 358_000),
        ("cifar10_loss", 56840, 99, 1_485_000),
        ("cifar10_error", 56840, 99, 1_485_000),
        ("cartpole", 50026, 93, 186_000),
    ],
)
def test_published_lengths_follow_from_the_presets(name, runs, iterations, total):
    config = load_config(name)
    pairs = pairs_per_epoch(runs - config.dataset.num_test_runs, config.dataset.target_epoch_size)
    assert pairs // config.train.mb_size == iterations
    assert iterations * config.train.num_ep == total


def test_a_published_yaml_file_is_read(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        """
defaults: [{override hydra/job_logging: disabled}]
hydra: {output_subdir: null, run: {dir: .}}
exp_name: mine
dataset: {name: "${exp_name}_loss", path: "data/${exp_name}", train_metric: avg_test_loss}
train: {base_lr: 4e-4, mb_size: 12}
test: {mb_size: "${train.mb_size}", freq: 20}
wandb: {name: "${exp_name}", mode: disabled}
"""
    )
    config = load_config(tmp_path / "mine.yaml", ["train.mb_size=7", "+exp_name=other", "hydra.run.dir=x"])
    assert (config.dataset.name, config.dataset.path, config.wandb.name) == ("other_loss", "data/other", "other")
    assert (config.train.base_lr, config.test.mb_size) == (4e-4, 7)
    with pytest.raises(ValueError, match=r"refers to \$\{train.size\}, which has no value"):
        load_config(tmp_path / "mine.yaml", ["test.mb_size=${train.size}"])
    with pytest.raises(ValueError, match=r"refers to .*, which has no value"):
        load_config(tmp_path / "mine.yaml", ["train.mb_size=${test.mb_size}"])  # in a circle


@pytest.mark.parametrize("name", ["cifar_loss", "cifar_error.yaml", "cifar10-error", "train/cifar10_loss"])
def test_other_names_of_presets(name):
    expected = "cifar10_loss" if "loss" in name else "cifar10_error"
    assert load_config(name).exp_name == expected


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
        (["train.base_lr=.nan"], "train.base_lr: expected float, got nan"),
        (["train.base_lr=true"], "train.base_lr: expected float, got True"),
        (["dataset.augment=maybe"], "dataset.augment: expected true or false, got 'maybe'"),
        (["train.ema_decay=2"], "train.ema_decay must be at least 0 and below 1, got 2.0"),
        (["vis.freq=-1"], "vis.freq must be at least 0, got -1"),
        (["transformer.tokens=unit"], "one of layers, units, got 'unit'; did you mean 'units'?"),
        (["train.mb_size=0"], "train.mb_size must be at least 1, got 0"),
        (["train.max_steps=-5"], "train.max_steps must be at least 1, got -5"),
        (["transformer.tokens=words"], "transformer.tokens: expected one of layers, units, got 'words'"),
        (["sampling.steps=1001"], "sampling.steps must be at most 1000, got 1001"),
        (["exp_name=../up"], "exp_name must be a plain folder name, got '../up'"),
        (["num_gpus=4"], "num_gpus must be 1, got 4"),
        (["test_only=true"], "test_only needs resume_path"),
        (["wandb.mode=maybe"], "wandb.mode: expected one of online, offline, disabled, got 'maybe'"),
        (["exp_name.a=3"], "exp_name.a: exp_name is no group of keys, but 'digits_loss'"),
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
