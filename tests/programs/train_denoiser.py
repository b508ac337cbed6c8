"""Run ``gpt-diffusion train`` on a small scale; with ``--resume`` if a run is there.

Usage: train_denoiser.py FOLDER ZOO
"""

import os
import sys
from pathlib import Path

folder, zoo = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
os.chdir(folder)  # the model file holds the configuration, so its paths must not depend on the folder
command = ["gpt-diffusion", "train", "digits_loss", f"dataset.path={zoo}", "device=cpu"]
command += ["transformer.n_embd=16", "transformer.n_layer=1", "transformer.n_head=2", "dataset.target_epoch_size=64"]
command += ["train.max_steps=90", "train.mb_size=8", "train.log_freq=4", "train.checkpoint_steps=6"]
if Path("results/digits_loss/config.yaml").exists():
    command.append("--resume")
os.execvp(command[0], command)
