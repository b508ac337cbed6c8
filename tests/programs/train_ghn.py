"""Run ``ghn train`` on a small scale; with ``--resume`` if a run is there.

Usage: train_ghn.py FOLDER
"""

import os
import sys
from pathlib import Path

folder = Path(sys.argv[1])
command = ["ghn", "train", "--out", str(folder), "--num-nets", "4", "--hid", "8", "--heads", "2", "--layers", "1"]
command += ["--max-shape", "4", "4", "3", "3", "--epochs", "2", "--meta-batch", "2", "--batch-size", "60"]
command += ["--save-every", "3", "--log-every", "2", "--device", "cpu"]
if (folder / "config.yaml").exists():
    command.append("--resume")
os.execvp(command[0], command)
