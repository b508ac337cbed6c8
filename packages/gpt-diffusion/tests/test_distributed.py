"""Training in two processes gives the losses and weights of one process with the joined batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from gpt_diffusion import load_pretrained, train
from gpt_diffusion.config import config_to_yaml
from gpt_diffusion.distributed import Processes

SMALL = ["train.max_steps=6", "train.log_freq=1", "train.checkpoint_freq=3", "train.ema_decay=0.9"]
SMALL += ["dataset.target_epoch_size=28", "vis.freq=2", "vis.num_nets_per_gpu=1"]  # prompted after 3 and 6 steps
LAYERS = ["transformer.tokens=layers", "transformer.split_policy=layer_by_layer", "transformer.num_frequencies=8"]


def losses(folder):
    return [line["loss"] for line in log_of(folder) if "loss" in line]


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_processes(config, folder, *options, count=2, expect=0):
    """The same configuration under torchrun."""
    path = folder / f"{config.exp_name}.yaml"
    path.write_text(config_to_yaml(config))
    code = "import sys; from gpt_diffusion.cli import main; sys.exit(main())"
    (folder / "program.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*torchrun, str(folder / "program.py"), "train", str(path), "--json", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (expect == 0), done.stderr
    return done


@pytest.mark.parametrize("overrides", [[], LAYERS], ids=["units", "layers"])
def test_parts_of_a_batch_give_the_result_of_the_whole(tiny_config, overrides):
    whole = train(tiny_config("exp_name=whole", *SMALL, *overrides), quiet=True)
    parts = train(tiny_config("exp_name=parts", "train.accumulate=4", *SMALL, *overrides), quiet=True)
    torch.testing.assert_close(losses(parts.folder), losses(whole.folder), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], [*LAYERS, "dataset.augment=true"]], ids=["units", "layers"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does(tiny_config, tmp_path, parallel, overrides):
    alone = train(tiny_config("exp_name=alone", *SMALL, *overrides), quiet=True)
    options = [f"train.parallel={parallel}", "train.accumulate=2"]
    config = tiny_config("exp_name=both", *SMALL, *overrides, *options)
    shown = json.loads(in_processes(config, tmp_path).stdout)  # one process speaks
    assert shown["finished"] and shown["steps"] == 6
    torch.testing.assert_close(losses(config.folder), losses(alone.folder), rtol=1e-4, atol=0)
    ours, theirs = (load_pretrained(folder).model.state_dict() for folder in (config.folder, alone.folder))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    judged = [line for line in log_of(config.folder) if "prompt_alignment_test_set" in line]
    assert [line["step"] for line in judged] == [3, 6] and (config.folder / "best.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_training_goes_on_with_another_number_of_processes(tiny_config, tmp_path, parallel):
    config = tiny_config("exp_name=stopped", f"train.parallel={parallel}", *SMALL)
    in_processes(config, tmp_path, "--limit-seconds", "0")  # stops after one step
    assert 0 < len(losses(config.folder)) < 6
    train(config, resume=True, quiet=True)
    whole = train(tiny_config("exp_name=whole", *SMALL), quiet=True)
    torch.testing.assert_close(losses(config.folder), losses(whole.folder), rtol=1e-4, atol=0)


def test_batches_that_cannot_be_divided_are_named(tiny_config):
    with pytest.raises(ValueError, match=r"train\.mb_size \(8\) must be a multiple of the number of processes \(3\)"):
        Processes(0, 3, torch.device("cpu")).rows(8)
    with pytest.raises(ValueError, match=r"train\.accumulate \(3\) must divide the batch of a process \(8"):
        train(tiny_config("train.accumulate=3"), quiet=True)
