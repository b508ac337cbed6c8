"""Datasets in the published format: read where they lie, split and drawn from as published."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gpt_diffusion import PublishedDataset, PublishedZoo, get_normalizer, load_config, open_runs, train
from gpt_diffusion.cartpole.policy import Actor
from gpt_diffusion.cli import main
from gpt_diffusion.config import DatasetConfig
from gpt_diffusion.dataset import ParameterDataset
from gpt_diffusion.published import find_metric, split_runs
from support.formats import close_environments
from support.golden import assert_close, assert_stats
from zoo_common import Symmetry, Zoo, convert
from zoo_common.tasks import get_task

GOLDEN = Path(__file__).parent / "golden" / "checkpoint_datasets"


@pytest.fixture(autouse=True)
def closed():
    yield
    close_environments()


def data_config(case):
    """The settings of a golden dataset."""
    spacing = {key: case["options"][key] for key in ("min_step_spacing", "max_step_spacing") if key in case["options"]}
    return DatasetConfig(
        name=case["dataset_name"],
        train_metric=case["train_metric"],
        openai_coeff=case["openai_coeff"],
        num_test_runs=case["num_test_runs"],
        target_epoch_size=case["target_epoch_size"],
        verify_done=case["options"].get("verify_done", False),
        **spacing,
    )


def symmetry_of(task):
    if task == "cartpole":
        return Symmetry.from_module(Actor(), torch.zeros(2, 4))
    return get_task(task).symmetry()


@pytest.mark.golden("parameter_dataset.json", cases="datasets")
def test_items_splits_and_networks_are_the_published_ones(golden):
    data, case = data_config(golden.case), golden.case
    folder = golden.path.parent / "checkpoint_datasets" / data.name.split("_")[0]
    zoo = PublishedZoo(folder, verify_done=data.verify_done)
    for split in ("train", "test"):
        runs, expected = split_runs(zoo, data, split), case[split]
        runs = runs[: case["options"].get("max_train_runs")] if split == "train" else runs
        if not expected or not expected["runs"]:
            assert len(runs) == 0
            continue
        dataset = PublishedDataset(
            zoo,
            runs,
            metric=find_metric(zoo, data.train_metric),
            normalizer=get_normalizer("openai", data.openai_coeff),
            epoch_size=data.target_epoch_size,
            min_spacing=data.min_step_spacing,
            max_spacing=data.max_step_spacing,
        )
        assert [zoo.runs[run].id for run in runs] == expected["runs"]
        assert len(dataset) == expected["length"]
        assert (list(zoo.layout.sizes), list(zoo.layout.names)) == (
            expected["parameter_sizes"],
            expected["parameter_names"],
        )
        assert [zoo.runs[run].checkpoints for run in runs] == expected["num_checkpoints"]
        assert dataset.best_metric(minimize=data.name != "cartpole") == expected["optimal"]
        assert dataset.weight_range == (expected["min_val"], expected["max_val"])
        assert_close(dataset.normalizer.range(*dataset.weight_range), expected["normalized_range"], "float64")
        for run, losses in enumerate(expected["run_losses"]):
            np.testing.assert_array_equal(np.float32(dataset.run_losses(run)), np.float32(losses))
        for network in expected["networks"]:
            place = network["run"], network["iter"]
            assert_stats(dataset.run_network(*place), network["normalized"])
            assert_stats(dataset.run_network(*place, normalize=False), network["raw"])
        permuted = PublishedDataset(
            zoo,
            runs,
            metric=dataset.metric,
            normalizer=dataset.normalizer,
            epoch_size=data.target_epoch_size,
            min_spacing=data.min_step_spacing,
            max_spacing=data.max_step_spacing,
            augment=symmetry_of(data.name),
        )
        for item in expected["items"]:
            for of, prefix in ((dataset, ""), (permuted, "augmented_")):
                torch.manual_seed(item["seed"])
                found = of[item["index"]]._asdict()
                for key in ("run_name", "checkpoint_key_0", "checkpoint_key_1", "step_spacing", "metric_0", "metric_1"):
                    assert found[key] == item[key]
                for key in ("parameters_0", "parameters_1"):
                    assert_stats(found[key], item[prefix + key])


@pytest.mark.parametrize("name", ["mnist", "cartpole"])
def test_batches_read_in_place_are_those_of_the_converted_zoo(name, tmp_path):
    convert(GOLDEN / name, tmp_path / "zoo", progress=False)
    there, zoo = PublishedZoo(GOLDEN / name), Zoo.open(tmp_path / "zoo")
    assert there.run_ids == zoo.run_ids and there.layout == zoo.layout
    metric = find_metric(zoo, "test_loss" if name == "mnist" else "train_ret")
    runs = np.arange(len(zoo))
    batches = [
        ParameterDataset(of, runs, metric=metric, normalizer=get_normalizer("none"), epoch_size=60).batch(20, 1)
        for of in (there, zoo)
    ]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a, b)
    assert there.filter().kept.tolist() == zoo.filter().kept.tolist()
    assert there.weights(1, -1).keys() == zoo.weights(1, -1).keys()
    assert torch.equal(there.params[0], zoo.params[0])
    for part in ("train", "test"):  # also by position in a zoo, where asked for
        data = DatasetConfig(num_test_runs=2, split="published")
        assert split_runs(zoo, data, part).tolist() == split_runs(there, data, part).tolist()


def test_the_published_training_runs_on_a_published_folder(tmp_path):
    small = ["transformer.n_embd=8", "transformer.n_layer=1", "transformer.n_head=2", "train.max_steps=6"]
    small += ["train.mb_size=4", "dataset.target_epoch_size=8", "dataset.num_test_runs=1", "test.freq=1"]
    small += ["test.mb_size=4", f"dataset.path={GOLDEN / 'mnist'}", f"out_dir={tmp_path}", "train.log_freq=2"]
    report = train(load_config("mnist_error", small), quiet=True)
    assert report.finished
    lines = [json.loads(line) for line in (report.folder / "metrics.jsonl").read_text().splitlines()]
    tests = [line for line in lines if "test_loss" in line]
    assert [line["epoch"] for line in tests] == [1, 2, 3]
    assert all(np.isfinite(line["test_loss"]) for line in tests)


def test_import_makes_a_zoo(capsys, tmp_path):
    assert main(["import", str(GOLDEN / "mnist"), str(tmp_path / "zoo"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 3
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.steps["000000"].tolist() == [0, 2, 9, 468 + 1, 468 + 10]  # 468 iterations in an epoch
    assert open_runs(DatasetConfig(path=str(tmp_path / "zoo"))).run_ids == zoo.run_ids


def test_a_folder_that_cannot_be_trained_on_is_named(tmp_path):
    data = DatasetConfig(name="mnist_loss", path=str(tmp_path / "zoo"))
    with pytest.raises(FileNotFoundError, match="zoo"):
        open_runs(data)
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"holds state dicts.*gpt-diffusion import"):
        open_runs(data, tmp_path)
    with pytest.raises(ValueError, match="digits_loss"):
        open_runs(DatasetConfig(name="digits_loss"), GOLDEN / "mnist")
    with pytest.raises(ValueError, match=r"dataset.num_test_runs \(3\) must be .* below the number of runs .*\(3\)"):
        split_runs(PublishedZoo(GOLDEN / "mnist"), DatasetConfig(num_test_runs=3), "train")
    with pytest.raises(ValueError, match=r"no metric 'test_return'; the zoo has .*avg_test_loss"):
        find_metric(PublishedZoo(GOLDEN / "mnist"), "test_return")


def test_missing_parts_are_named_and_the_other_runs_stay(tmp_path, caplog):
    shutil.copytree(GOLDEN / "mnist", tmp_path / "mnist")
    (tmp_path / "mnist" / "000001" / "runs.json").unlink()
    zoo = PublishedZoo(tmp_path / "mnist")
    assert zoo.run_ids == ("000000", "000002")
    assert "1 runs are passed over" in caplog.text and "000001" in caplog.text
    file = tmp_path / "mnist" / "000000" / "runs.json"
    file.write_text(file.read_text().replace("ep001_it00010", "ep001_it00011"))
    with pytest.raises(ValueError, match=r"record '000000/ep001_it00011.pt' is missing"):
        PublishedZoo(tmp_path / "mnist").params[0, -1]
