"""What ``sane sample`` and ``sane finetune`` do: new networks, beside what costs nothing."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zoo_common.checkpoint import load_checkpoint, save_checkpoint
from zoo_common.datasets import Splits
from zoo_common.files import write_json

from sane.cli import FinetuneCommand, SampleCommand
from sane.commands import (
    check_folder,
    check_least,
    check_rate,
    conditioning,
    finite,
    halo_of,
    model_and_zoo,
    networks_and_images,
    print_table,
    show,
)
from sane.comparison import compare_groups, nearest_members, novelty_report, rival_groups
from sane.images import first_images, images_of
from sane.networks import initialise
from sane.population import FineTuning, Networks
from sane.preparation import Prepared, known_network, network_of, symmetry_of
from sane.sampling import KernelDensity, Sampler


def sample(command: SampleCommand) -> None:
    """Sample networks, and compare them with what costs nothing."""
    counts = {name: getattr(command, name) for name in ("num", "anchors", "train_images", "judge_images")}
    check_least(1, **counts)
    check_least(0, epochs=command.epochs, condition=command.condition, seed=command.seed)
    check_rate(command.lr)
    for path in (command.out, command.report):
        if path is not None:
            check_folder(path, command.model, command.prepared)
    model, prepared = model_and_zoo(command.model, command.prepared, command.device)
    normed = command.condition > 0 and any(n.endswith("running_var") for n in prepared.tokenizer.layout.names)
    judged = command.strategy != "plain" or not command.no_compare or command.choose == "best" or normed
    networks, splits = networks_and_images(prepared, command) if judged else (None, None)
    if splits is not None:
        parts = (first_images(part, command.judge_images) for part in (splits.validation, splits.test))
        splits = Splits(splits.train, *parts)
    anchors, scores = _anchors(prepared, command, networks, splits)
    repair = conditioning(networks, splits, command.condition, command.seed) if networks and splits else None
    halo = halo_of(command.halo)
    density = KernelDensity(command.mode, command.bandwidth, command.shared_noise, command.relative)
    sampler = Sampler(model, model.encode(anchors, halo), density, halo, repair)

    def score(vectors: Tensor) -> Tensor:
        assert networks is not None and splits is not None, "judged says so"
        return networks.accuracy(vectors, splits.validation)

    if command.strategy == "plain":
        found = sampler.plain(command.num, command.seed)
    elif command.strategy == "subsampled":
        found = sampler.subsampled(command.num, score, draws=command.draws, seed=command.seed)
    else:
        found = sampler.bootstrapped(
            command.num, score, draws=command.draws, keep=command.keep, iterations=command.iterations, seed=command.seed
        )
    if broken := int((~found.vectors.isfinite().all(1)).sum()):
        raise ValueError(
            f"{broken} of the {command.num} sampled networks have weights that are not finite: use a smaller --bandwidth "
            f"(it is {command.bandwidth:g})"
        )
    facts = {key: value for key, value in model.facts.items() if key != "trained_on"}
    facts |= {"strategy": command.strategy, "mode": command.mode, "seed": command.seed}
    save_checkpoint(command.out, prepared.tokenizer.layout.unflatten(found.vectors), facts)
    report: dict[str, Any] = {"file": str(command.out), "networks": len(found.vectors)}
    if found.rounds:
        report["rounds"] = [r._asdict() for r in found.rounds]
    if not command.no_compare and networks is not None and splits is not None:
        report |= _judged(found.vectors, anchors, scores, prepared, networks, splits, command)
    if command.report is not None:
        write_json(command.report, finite(report))
    if command.json:
        print(json.dumps(finite(report)))
        return
    if "groups" in report:
        rows = [
            [g[key] for key in ("name", "networks", "zero_shot", "zero_shot_std", "best")] for g in report["groups"]
        ]
        tuned = [
            [g["finetuned"][-1] if g["finetuned"] else None, g["best_finetuned"], g["ensemble"]]
            for g in report["groups"]
        ]
        head = [
            "test accuracy",
            "networks",
            "zero-shot",
            "std",
            "best",
            f"after {command.epochs} epoch{'' if command.epochs == 1 else 's'}",
            "best",
            "ensemble",
        ]
        print_table(head, [[*a, *b] for a, b in zip(rows, tuned, strict=True)])
    show({key: value for key, value in report.items() if key not in ("groups", "rounds", "novelty")}, False)
    if "novelty" in report:
        print("distance to the nearest training checkpoint, by the norm of the network, after alignment:")
        show(report["novelty"], False, "  ")


def _anchors(
    prepared: Prepared, command: SampleCommand, networks: Networks | None, splits: Splits | None
) -> tuple[Tensor, Tensor]:
    """Last checkpoints (a, d) of some training runs, and their validation accuracies (a,)."""
    samples = prepared.samples["train"]
    _, behind = np.unique(samples.runs[::-1], return_index=True)
    last = np.sort(len(samples.runs) - 1 - behind)
    if command.anchors > len(last):
        raise ValueError(f"--anchors ({command.anchors}) is more than the {len(last)} training runs")
    if command.choose == "random":
        last = np.random.default_rng(command.seed).permutation(last)
    if command.choose != "best":
        last = last[: command.anchors]
    vectors = prepared.vectors("train", last)
    if networks is None or splits is None:
        return vectors, torch.zeros(len(vectors))
    scores = networks.accuracy(vectors, splits.validation)
    best = scores.argsort(descending=True)[: command.anchors]
    return vectors[best], scores[best]


def _judged(
    vectors: Tensor,
    anchors: Tensor,
    scores: Tensor,
    prepared: Prepared,
    networks: Networks,
    splits: Splits,
    command: SampleCommand,
) -> dict[str, Any]:
    """Accuracies of samples and rivals, before and after the same fine-tuning, and the novelty of the samples.

    Where samples are the best of many draws, so are the noisy anchors and the random initialisations.
    """
    draws = len(vectors) if command.strategy == "plain" else command.draws
    random = networks.layout.stack(fresh_networks(prepared, draws, command.seed)).detach()
    rivals = rival_groups(vectors, anchors, scores, prepared.tokenizer, random, command.seed, draws)
    if networks.has_batch_norm:
        repair = conditioning(networks, splits, command.condition, command.seed)
        assert repair is not None, "there are batch norms"
        rivals = {name: group if name == "best anchor" else repair(group) for name, group in rivals.items()}
    for name, group in rivals.items():
        if len(group) > len(vectors):
            rivals[name] = group[networks.accuracy(group, splits.validation).topk(len(vectors)).indices]
    finetuning = FineTuning(epochs=command.epochs, lr=command.lr, limit=command.train_images)
    groups = compare_groups(networks, {"sampled": vectors, **rivals}, splits, finetuning, command.seed)
    symmetry = symmetry_of(prepared.zoo) if prepared.config.align != "none" else None

    def near(queries: Tensor) -> Any:  # noqa: ANN401 (Nearest)
        return nearest_members(queries, lambda: (block for _, block in prepared.blocks("train")), symmetry)

    tests = prepared.samples["test"]
    _, behind = np.unique(tests.runs[::-1], return_index=True)
    held = len(tests.runs) - 1 - behind
    unseen = near(prepared.vectors("test", held[:20])) if len(held) else None
    return {
        "groups": [dataclasses.asdict(group) for group in groups],
        "novelty": dataclasses.asdict(novelty_report(near(vectors), unseen)),
    }


def fresh_networks(prepared: Prepared, count: int, seed: int) -> list[torch.nn.Module]:
    """Networks as the training runs began, as far as their configurations tell: each with the settings of one of them."""
    constructor, _ = network_of(prepared.zoo)
    runs = np.random.default_rng(seed).choice(prepared.samples["train"].runs, count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = [constructor() for _ in range(count)]
        for module, run in zip(modules, runs, strict=True):
            initialise(module, prepared.zoo.runs[int(run)].config.get("model::init_type"))
    return modules


def finetune(command: FinetuneCommand) -> None:
    """Train stacked networks on and judge them."""
    check_least(1, batch=command.batch, train_images=command.train_images, reset_classifier=command.reset_classifier)
    check_least(0, epochs=command.epochs, seed=command.seed)
    check_rate(command.lr)
    if command.out is not None:
        check_folder(command.out, command.networks)
    if command.networks.is_dir():
        raise ValueError(f"{command.networks} is a folder: give a file of `sane sample`")
    content = load_checkpoint(command.networks)
    if not content.metadata.keys() & {"task", "network"}:
        raise ValueError(f"{command.networks} holds no networks: give a file of `sane sample`")
    constructor, shape = known_network(content.metadata, str(command.networks))
    module, state, facts = constructor(), content.state, dict(content.metadata)
    if "classes" in facts:  # an earlier transfer
        module, _ = reset_classifier(module, state, facts["classes"], command.seed)
    if command.reset_classifier is not None:
        module, state = reset_classifier(module, state, command.reset_classifier, command.seed)
        facts["classes"] = command.reset_classifier
    networks = Networks(module)
    splits = images_of(facts, shape, command.data, command.data_dir, download=command.download)
    facts |= {"data": command.data} if command.data is not None else {}
    vectors = networks.layout.flatten(state)
    if vectors.ndim == 1:
        vectors = vectors[None]
    if broken := int((~vectors.isfinite().all(1)).sum()):
        raise ValueError(
            f"{broken} of the {len(vectors)} networks in {command.networks} have weights that are not finite"
        )
    told, there = networks.population(vectors[:1], splits.test.images[:1]).shape[-1], int(splits.train.labels.max()) + 1
    if told < there:
        raise ValueError(
            f"the data have {there} classes, the networks tell {told} apart: use --reset-classifier {there}"
        )
    config = FineTuning(
        command.epochs,
        command.batch,
        command.lr,
        command.optimizer,
        limit=command.train_images,
        schedule=command.schedule,
    )
    vectors, accuracies = networks.finetune_judged(vectors, splits, config, seed=command.seed)
    if command.out is not None:
        save_checkpoint(command.out, networks.layout.unflatten(vectors), facts)
    ensemble = networks.ensemble_accuracy(vectors, splits.test)
    report: dict[str, Any] = {
        f"after epoch {k}" if k else "zero-shot": {
            f"{part}_acc_{kind}": value.item()
            for part, table in accuracies.items()
            for kind, value in (("mean", table[k].mean()), ("std", table[k].std(correction=0)))
        }
        for k in range(command.epochs + 1)
    }
    each = {f"{part}_acc_each": table.tolist() for part, table in accuracies.items()} if command.json else {}
    show(report | {"ensemble": ensemble} | each, command.json)


def reset_classifier(
    module: torch.nn.Module, state: Mapping[str, Tensor], classes: int, seed: int
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A network with another number of classes, and stacked weights with the last layer initialised as torch does.

    Raises:
        ValueError: The network does not end with a dense layer.
    """
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    if not found or list(module.state_dict())[-1].rpartition(".")[0] != found[-1][0]:
        raise ValueError("the network does not end with a dense layer: its classifier cannot be replaced")
    name, last = found[-1]
    parent, _, child = name.rpartition(".")
    count = next(iter(state.values())).shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = [torch.nn.Linear(last.in_features, classes, last.bias is not None) for _ in range(count)]
    setattr(module.get_submodule(parent), child, heads[0])
    fresh = {f"{name}.{key}": torch.stack([head.state_dict()[key] for head in heads]) for key in heads[0].state_dict()}
    return module, {**state, **{key: value.detach() for key, value in fresh.items()}}
