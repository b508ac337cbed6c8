"""SANE from nothing, offline: make a zoo, tokenize, train, encode, decode, predict and sample.

Run it with ``uv run packages/sane/examples/quickstart.py``; ``--help`` lists the sizes. It follows the exploration
notebook of the published repository, on scikit-learn's digits.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from sane import (
    Halo,
    KernelDensity,
    Networks,
    PrepareConfig,
    PropertyPredictor,
    Sampler,
    WindowDataset,
    ZooPlan,
    load_config,
    load_model,
    prepare,
    pretrain,
    reconstruct,
    train_zoo,
)
from sane.commands import labelled_split
from sane.features import layer_axes
from sane.images import images_of
from sane.preparation import facts_of, network_of
from zoo_common.zoo import Zoo


@dataclass(frozen=True)
class Sizes:
    """How much to compute."""

    runs: int = 120
    """Networks in the zoo."""
    zoo_epochs: int = 8
    """Their epochs; there is a checkpoint after each."""
    epochs: int = 60
    """Epochs of the autoencoder."""
    folder: Path | None = None
    """Where to keep the files; default: a temporary folder."""


def main(sizes: Sizes) -> dict[str, float]:
    """Run everything; returns the numbers that are printed."""
    folder = sizes.folder or Path(tempfile.mkdtemp(prefix="sane-"))

    # 1. A zoo: networks with different learning rates, weight decays and initialisations.
    settings = {
        "optim::lr": (3e-4, 1e-3, 3e-3, 1e-2),
        "optim::wd": (0, 1e-3),
        "model::init_type": ("kaiming_uniform", "normal"),
    }
    plan = ZooPlan("MLP", "digits", sizes.zoo_epochs, settings=settings)
    train_zoo(plan, folder / "zoo", runs=sizes.runs, quiet=False)
    zoo = Zoo.open(folder / "zoo")
    print(f"zoo: {len(zoo)} runs of {zoo.runs[0].checkpoints} checkpoints with {zoo.layout.size} weights")

    # 2. Splits, alignment and statistics; the weights stay where they are.
    prepared = prepare(zoo, PrepareConfig())
    prepared.save(folder / "prepared.safetensors")

    # 3. Tokens: one row per output channel. The round trip is exact.
    vectors = prepared.vectors("test", slice(0, 8))
    tokens = prepared.tokenizer.tokenize(vectors)
    assert torch.equal(prepared.tokenizer.detokenize(tokens), vectors)
    batch = WindowDataset(prepared, "train", window=12).batch(4, step=0)
    print(f"tokens of a checkpoint: {tuple(tokens.shape[1:])}; two views of four windows: {tuple(batch.views.shape)}")

    # 4. The autoencoder.
    settings = [
        f"prepared={folder}/prepared.safetensors",
        f"out_dir={folder}/results",
        f"training.epochs={sizes.epochs}",
    ]
    settings += ["model.window=12", "model.d_model=96", "model.layers=2", "model.latent=16", "training.target=clean"]
    settings += ["training.test_every=0", "optim.lr=2e-3"]
    report = pretrain(load_config("small", settings))
    model = load_model(report.folder)

    # 5. Encode, decode, and what is lost.
    networks, splits = Networks(network_of(zoo)[0]()), images_of(facts_of(zoo), network_of(zoo)[1])
    lost = reconstruct(model, vectors, lambda v: networks.accuracy(v, splits.validation))
    print(
        f"reconstruction: relative error {lost.relative_error:.3f}, accuracy {lost.accuracy_before:.3f} -> {lost.accuracy_after:.3f}"
    )
    print(f"embeddings by windows: cosine {model.compare(vectors, Halo(8, 4)):.4f} to full attention")

    # 6. Accuracy and epoch from the embeddings, beside layer statistics.
    axes = layer_axes((model.encode(block) for _, block in prepared.blocks("train")), prepared.tokenizer)
    groups = [
        labelled_split(model, prepared, split, ("test_acc", "epoch"), ("layer statistics",), axes=axes)
        for split in prepared.samples
    ]
    scores = PropertyPredictor(groups[0], groups[1]).judge(groups[2])
    for score in scores:
        print(f"R2 of {score.property} from {score.features}: {score.r2:.3f} ({score.low:.3f} .. {score.high:.3f})")

    # 7. New networks around the five best ones.
    last = prepared.vectors("train", slice(zoo.runs[0].checkpoints - 1, None, zoo.runs[0].checkpoints))
    best = last[networks.accuracy(last, splits.validation).argsort(descending=True)[:5]]
    sampler = Sampler(model, model.encode(best), KernelDensity("joint", bandwidth=0.1))
    new = sampler.subsampled(5, lambda v: networks.accuracy(v, splits.validation), draws=50)
    accuracy = networks.accuracy(new.vectors, splits.test)
    print(
        f"sampled networks: test accuracy {accuracy.mean():.3f} (best anchor: {networks.accuracy(best[:1], splits.test)[0]:.3f})"
    )

    numbers = {f"r2 {s.property} {s.features}": s.r2 for s in scores}
    numbers |= {"relative_error": lost.relative_error, "sampled_accuracy": accuracy.mean().item()}
    (folder / "numbers.json").write_text(json.dumps(numbers))
    return numbers


if __name__ == "__main__":
    main(tyro.cli(Sizes, description=__doc__))
