"""Run ``sane pretrain`` on a small scale; with ``--resume`` if a run is there.

Usage: pretrain_sane.py FOLDER PREPARED
"""

import os
import sys
from pathlib import Path

folder, prepared = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
os.chdir(folder)
command = ["sane", "pretrain", "small", f"prepared={prepared}", "device=cpu", "model.d_model=16", "model.heads=2"]
command += ["model.layers=1", "model.latent=4", "model.window=12", "training.batch=8", "training.epochs=12"]
command += ["training.views=mixed", "training.log_every=3", "training.save_every=4", "training.test_every=3"]
if Path("results/small/config.yaml").exists():
    command.append("--resume")
os.execvp(command[0], command)
