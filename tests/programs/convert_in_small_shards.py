"""``zoo convert`` with shards of one run, so that there are many.

Usage: convert_in_small_shards.py SOURCE TARGET [OPTIONS]
"""

import sys

from zoo_common.cli import main
from zoo_common.formats import zoos

zoos._SHARD_BYTES = 1
sys.exit(main(["convert", *sys.argv[1:]]))
