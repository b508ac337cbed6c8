"""Run ``pilimit train digits`` on a small scale; with ``--resume`` if a run is there.

Usage: train_infinite.py FOLDER [OPTIONS ...]
"""

import os
import sys
from pathlib import Path

folder = Path(sys.argv[1])
command = ["pilimit", "train", "digits", "--save-dir", str(folder), "--train-subset-size", "120", "--quiet", "--epochs"]
command += ["3", "--r", "8", "--batch-size", "8", "--lr", "0.5", "--checkpoint-steps", "3", *sys.argv[2:]]
if (folder / "config.json").exists():
    command.append("--resume")
os.execvp(command[0], command)
