"""Train a small zoo of CNNs with ``sane zoo train``.

Usage: train_sane_zoo.py FOLDER
"""

import os
import sys

command = ["sane", "zoo", "train", "digits", sys.argv[1], "--runs", "10", "--epochs", "2", "--chunk", "2"]
command += ["--train-images", "64", "--test-images", "32", "training::batchsize=32", "--split", "0.6", "0.2", "0.2"]
os.execvp(command[0], command)
