"""CPU seconds per step of a training with bounded atoms, recompression included: they do not grow with the steps.

OMP_NUM_THREADS=1 python packages/pilimit/benchmarks/bounded.py
"""

import argparse
import json
import math
import resource
import statistics
import time

import torch
from pilimit.config import TrainConfig
from pilimit.data import choose_data
from pilimit.evaluation import evaluate
from pilimit.forecast import atoms_bytes
from pilimit.training import Training
from tqdm import tqdm


def whole_rounds(times: list[float], marks: list[int], begin: int, end: int) -> float:
    """Mean of the steps in a window that lie between its first and its last recompression, the last one included."""
    inside = [mark for mark in marks if begin < mark <= end]
    if len(inside) < 2:
        raise SystemExit("a tenth of the steps has fewer than two recompressions: give more --steps")
    return statistics.mean(times[inside[0] : inside[-1]])


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--max-atoms", type=int, default=2000)
    parser.add_argument("--keep-atoms", type=int, default=500)
    parser.add_argument("--r", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    config = TrainConfig(
        "digits", epochs=math.ceil(options.steps / 100), batch_size=options.batch, r=options.r, lr=0.5, gclip=0.4,
        gclip_per_param=True, wd=1e-5, bias_alpha=0.5, scheduler="cosine", max_atoms=options.max_atoms,
        keep_atoms=options.keep_atoms, quiet=True,
    )  # fmt: skip
    run, times, changes, marks = Training(config, choose_data(config)), [], [], []
    for _ in tqdm(range(options.steps)):
        began = time.process_time()
        line = run.advance()
        times.append(time.process_time() - began)
        if line is not None:
            changes.append(line["compression"]["output_change"])
            marks.append(run.step)
        if run.step % run.per_epoch == 0:
            run.sums.zero_()
    tenth = options.steps // 10
    early, late = (whole_rounds(times, marks, end - tenth, end) for end in (2 * tenth, options.steps))
    _, accuracy = evaluate(run.net, run.test_images, run.test_labels, config)
    result = {
        "threads": torch.get_num_threads(), "steps": options.steps, "recompressions": len(changes),
        "mean_ms_10_to_20_percent": round(1e3 * early, 3), "mean_ms_last_10_percent": round(1e3 * late, 3),
        "late_over_early": round(late / early, 3), "median_ms": round(1e3 * statistics.median(times), 3),
        "p99_ms": round(1e3 * statistics.quantiles(times, n=100)[98], 3), "max_ms": round(1e3 * max(times), 1),
        "largest_output_change": max(changes, default=0.0), "test_acc": accuracy,
        "atoms_mb": atoms_bytes(run.net) / 1e6,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
