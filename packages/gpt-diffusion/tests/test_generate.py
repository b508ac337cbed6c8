import itertools
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from gpt_diffusion.generation import Forecast, generate, supervised, train_from
from gpt_diffusion.generation.batches import Batches, derive_seed, flip_crop
from gpt_diffusion.generation.chunks import missing
from gpt_diffusion.generation.schedule import random_save_points, save_points
from gpt_diffusion.generation.trainers import TRAINERS, Job, initial_vectors, strategies_for
from torch import nn
from zoo_common.datasets import Part, Splits
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Cnn, Mlp, Task, TrainingRecipe, classification_loss, get_task
from zoo_common.zoo import Zoo


def deep():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Sigmoid(), nn.Linear(6, 4)
    )


NETWORKS = {
    "mlp": (lambda: Mlp(12, 6, 4), (3, 2, 2), "none", 200),
    "deep": (deep, (3, 2, 2), "none", 200),
    "cnn": (Cnn, (3, 6, 6), "flip_crop", 20),
}


def part(shape, n, seed):
    """Clusters, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    centres = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return Part(centres[labels] + 0.7 * torch.randn(n, *shape, generator=generator), labels)


def toy(constructor=lambda: Mlp(12, 6, 4), shape=(3, 2, 2), name="toy_loss", **recipe):
    splits = Splits(part(shape, 50, 1), part(shape, 20, 2), part(shape, 30, 3))
    settings = {"batch": 8, "lr": 0.05, "steps": 30, "save_points": "geometric", "save_count": 5} | recipe
    return Task(
        name, constructor, lambda: tuple(splits.validation), classification_loss, True, 0.1, 0.1, "val_loss", shape,
        recipe=TrainingRecipe(**settings), splits=lambda: splits,
    )  # fmt: skip


@pytest.fixture(params=NETWORKS)
def job(request):
    make, shape, augmentation, steps = NETWORKS[request.param]
    data, module = part(shape, 50, 1), make().double()
    recipe = TrainingRecipe(batch=8, lr=0.05, steps=steps, augmentation=augmentation)
    layout = ParameterLayout.from_module(module)
    return make, Job(module, layout, recipe, data.images.double(), data.labels, recipe.learning_rates(50, steps))


def reference(job, vector, seed, steps):
    """The obvious loop, with torch's plain SGD."""
    job.layout.load_into(job.module, vector)
    optimizer = torch.optim.SGD(job.module.parameters(), lr=1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    generator, epoch, at = torch.Generator().manual_seed(seed), None, 0
    for rate in job.rates[:steps]:
        if epoch is None or at + 8 > len(epoch):
            epoch, at = torch.randperm(50, generator=generator)[:48], 0
            if job.recipe.augmentation == "flip_crop":
                draws = torch.randint(2**30, (48, 3), generator=generator) % torch.tensor([2, 8, 8])
        x, y = job.images[epoch[at : at + 8]], job.labels[epoch[at : at + 8]]
        if job.recipe.augmentation == "flip_crop":
            cropped = []
            for image, (flip, row, column) in zip(x, draws[at : at + 8].tolist(), strict=True):
                padded = F.pad(image.flip(2) if flip else image, (4, 4, 4, 4))
                cropped.append(padded[:, row : row + 6, column : column + 6])
            x = torch.stack(cropped)
        at += 8
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(job.module(x), y).backward()
        optimizer.step()
    return job.layout.flatten(job.module).detach()


def test_every_strategy_equals_the_plain_loop_whatever_trains_beside(job):
    make, job = job
    steps = len(job.rates)
    initial = initial_vectors(make, job.layout, range(6)).double()
    saves = torch.tensor([[0, 3, steps]] * 6)
    expected = {i: reference(job, initial[i], 100 + i, steps) for i in (0, 5)}
    for name in strategies_for(job.module, job.layout):
        saved = TRAINERS[name](job, initial, [100 + i for i in range(6)], 1, saves, lambda _: None)
        assert torch.equal(saved[:, 0], initial)
        for i, vector in expected.items():
            assert (saved[i, 2] - vector).abs().max() < 1e-9
            assert (vector - initial[i]).abs().max() > 1e-2
        alone = TRAINERS[name](job, initial[5:], [105], 1, saves[5:], lambda _: None)
        assert (alone - saved[5:]).abs().max() < 1e-9


def test_groups_share_the_order(job):
    make, job = job
    initial = initial_vectors(make, job.layout, range(6)).double()
    saves = torch.tensor([[10, 20]] * 6)
    apart = TRAINERS["loop"](job, initial, [7, 7, 7, 8, 8, 8], 1, saves, lambda _: None)
    for name in strategies_for(job.module, job.layout):
        together = TRAINERS[name](job, initial, [7, 8], 3, saves, lambda _: None)
        assert (together - apart).abs().max() < 1e-9


def test_runs_are_saved_at_their_own_points(job):
    make, job = job
    initial = initial_vectors(make, job.layout, range(2)).double()
    saves = torch.tensor([[0, 2, 9], [1, 2, 20]])
    for name in strategies_for(job.module, job.layout):
        saved = TRAINERS[name](job, initial, [1, 2], 1, saves, lambda _: None)
        for run in range(2):
            for place, step in enumerate(saves[run].tolist()):
                assert (saved[run, place] - reference(job, initial[run], 1 + run, step)).abs().max() < 1e-9


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own():
    images, labels = torch.arange(10.0)[:, None], torch.arange(10)
    stream = iter(Batches(images, labels, [1, 2], batch=5, augmentation="none"))
    epochs = [torch.cat([next(stream)[1].clone() for _ in range(2)], 1) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort(1)[0], labels.expand(2, -1))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0][0], epochs[0][1])
    x, y = next(stream)
    assert torch.equal(x[..., 0].long(), y)


def test_crop_offsets_and_flips_cover_their_range():
    images = torch.arange(36.0).view(1, 1, 6, 6).expand(2, -1, -1, -1) + 1
    same = flip_crop(images, torch.tensor([[0, 4, 4], [1, 4, 4]]))
    assert torch.equal(same[0], images[0])
    assert torch.equal(same[1], images[1].flip(2))
    assert flip_crop(images, torch.tensor([[0, 0, 0], [0, 7, 7]]))[0, 0, 4, 4] == 1
    draws = Batches(images[:1].expand(9, -1, -1, -1), torch.zeros(9), [3], batch=2, augmentation="flip_crop")._draw(
        5000
    )
    assert [sorted(set(draws[0, :, i].tolist())) for i in range(3)] == [[0, 1], [*range(8)], [*range(8)]]


@pytest.mark.parametrize("kind", ["even", "geometric"])
@pytest.mark.parametrize(("count", "steps"), [(2, 1), (5, 10), (11, 10), (42, 1000), (200, 11700), (3, 7)])
def test_save_points_rise_from_the_start_to_the_end(kind, count, steps):
    points = save_points(kind, count, steps)
    assert len(points) == count
    assert points[0] == 0
    assert points[-1] == steps
    assert all(a < b for a, b in itertools.pairwise(points))


def test_random_save_points_are_distinct_and_keep_the_ends():
    points = random_save_points(200, 11700, 5)
    assert len(set(points)) == 200
    assert (points[0], points[-1]) == (0, 11700)
    assert random_save_points(3, 2, 0) == [0, 1, 2]


def test_seeds_depend_on_everything():
    seeds = {derive_seed(s, p, i) for s in range(3) for p in ("init", "order") for i in range(50)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def contents(folder):
    zoo = Zoo.open(folder)
    metrics = [torch.from_numpy(zoo.metrics[name].padded()) for name in sorted(zoo.metrics)]
    return list(zoo.run_ids), torch.cat([zoo.params[i].clone() for i in range(len(zoo))]), torch.stack(metrics)


def test_a_zoo_holds_every_run_with_its_metrics(tmp_path):
    task = toy()
    report = generate(task, tmp_path / "zoo", runs=7, chunk=3, share_batches=2, strategy="stacked", progress=False)
    assert (report.runs, report.dropped, report.remaining, report.stopped) == (7, 0, 0, None)
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.verify().problems == ()
    assert zoo.task == "toy"
    assert [run.config["order"] for run in zoo.runs] == [0, 0, 1, 1, 2, 2, 3]
    assert zoo.steps[0].tolist() == save_points("geometric", 5, 30)
    assert zoo.attributes["generate"]["strategy"] == "stacked"
    net = task.constructor()
    for run, checkpoint in ((0, 0), (3, 2), (6, 4)):
        zoo.layout.load_into(net, zoo.params[run, checkpoint])
        for prefix, (images, labels) in (("val", task.splits().validation), ("test", task.splits().test)):
            loss = classification_loss(images, labels, net)
            error = 100 * (net(images).argmax(1) != labels).double().mean().item()
            assert zoo.metrics[f"{prefix}_loss"][run, checkpoint] == pytest.approx(loss, rel=1e-5)
            assert zoo.metrics[f"{prefix}_error"][run, checkpoint] == pytest.approx(error)
    losses = zoo.metrics["val_loss"].padded()
    assert (losses[:, -1] < 0.8 * losses[:, 0]).all()


def test_digits_are_learnt(tmp_path):
    generate("digits", tmp_path / "zoo", runs=8, steps=300, progress=False)
    zoo = Zoo.open(tmp_path / "zoo")
    errors = zoo.metrics["test_error"].padded()
    assert (errors[:, 0] > 70).all()
    assert (errors[:, -1] < 12).all()


def test_the_probe_is_recorded_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(supervised, "probe", lambda work, names: dict.fromkeys(names, 1.0) | {"vmap": 5.0})
    assert generate(toy(), tmp_path / "zoo", runs=4, chunk=2, limit_seconds=0, progress=False).strategy == "vmap"
    monkeypatch.setattr(supervised, "probe", None)
    report = generate(toy(), tmp_path / "zoo", runs=4, chunk=2, progress=False)
    assert (report.strategy, report.runs) == ("vmap", 4)


def test_the_probe_measures_every_strategy(tmp_path):
    forecast = generate(toy(), tmp_path / "zoo", runs=100, dry_run=True, progress=False)
    assert isinstance(forecast, Forecast)
    assert set(forecast.model_steps_per_second) == {"loop", "vmap", "stacked"}
    assert forecast.strategy == max(forecast.model_steps_per_second, key=forecast.model_steps_per_second.get)
    assert forecast.model_steps == 3000
    assert not (tmp_path / "zoo").exists()
    written = generate(toy(), tmp_path / "zoo", runs=100, progress=False)
    size = sum(f.stat().st_size for f in (tmp_path / "zoo" / "shards").iterdir())
    assert written.runs == 100
    assert 0.7 < forecast.bytes / size < 1.1


def test_an_interrupted_generation_is_continued_to_the_same_zoo(tmp_path, monkeypatch):
    options = {"runs": 5, "chunk": 2, "strategy": "stacked", "progress": False}
    generate(toy(), tmp_path / "whole", **options)
    train, calls = supervised.Supervised.train, []

    def interrupted(work, runs, tick):
        calls.append(runs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(work, runs, tick)

    monkeypatch.setattr(supervised.Supervised, "train", interrupted)
    report = generate(toy(), tmp_path / "cut", **options)
    assert (report.stopped, report.runs, report.remaining) == ("interrupted", 2, 3)
    report = generate(toy(), tmp_path / "cut", **options)
    assert (report.stopped, report.runs, report.remaining) == (None, 5, 0)
    for a, b in zip(contents(tmp_path / "whole"), contents(tmp_path / "cut"), strict=True):
        assert a == b if isinstance(a, list) else torch.equal(a, b)


def run_of(folder, run_id):
    zoo = Zoo.open(folder)
    return zoo.params[run_id].clone(), [zoo.metrics[name][run_id].tolist() for name in sorted(zoo.metrics)]


@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_a_finished_zoo_can_be_extended(tmp_path, strategy):
    """What is there stays; in float64, what comes is what a larger zoo would have had at once."""
    options = {"chunk": 4, "share_batches": 2, "strategy": strategy, "progress": False, "dtype": "float64"}
    generate(toy(), tmp_path / "zoo", runs=7, **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "zoo" / "shards").iterdir()}
    report = generate(toy(), tmp_path / "zoo", runs=11, progress=False, share_batches=2, dtype="float64")
    assert (report.runs, report.model_steps, report.remaining, report.strategy) == (11, 120, 0, strategy)
    for name, content in before.items():
        assert (tmp_path / "zoo" / "shards" / name).read_bytes() == content
    generate(toy(), tmp_path / "whole", runs=11, **options)
    ids, params, metrics = contents(tmp_path / "zoo")
    expected_ids, expected, expected_metrics = contents(tmp_path / "whole")
    assert ids == expected_ids
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics, expected_metrics, rtol=1e-5, atol=1e-5)
    assert [run.config for run in Zoo.open(tmp_path / "zoo").runs] == [
        run.config for run in Zoo.open(tmp_path / "whole").runs
    ]
    fewer = generate(toy(), tmp_path / "zoo", runs=2, progress=False, share_batches=2, dtype="float64")
    assert (fewer.runs, fewer.model_steps, fewer.remaining, fewer.dropped) == (11, 0, 0, 0)


def test_seeds_fill_one_zoo_side_by_side(tmp_path):
    """Chunks of two seeds in turns give the runs that each seed gives alone."""
    options = {"chunk": 2, "strategy": "stacked", "progress": False}
    for runs, seed in ((2, 0), (3, 1), (4, 0)):
        report = generate(toy(), tmp_path / "both", runs=runs, seed=seed, **options)
    assert (report.runs, report.dropped, report.remaining) == (7, 0, 0)
    for runs, seed in ((4, 0), (3, 1)):
        generate(toy(), tmp_path / str(seed), runs=runs, seed=seed, **options)
        for run_id in Zoo.open(tmp_path / str(seed)).run_ids:
            ours, alone = run_of(tmp_path / "both", run_id), run_of(tmp_path / str(seed), run_id)
            assert torch.equal(ours[0], alone[0]) and ours[1] == alone[1]


def test_without_end_until_the_time_is_up(tmp_path):
    options = {"chunk": 2, "strategy": "stacked", "progress": False}
    generate(toy(), tmp_path / "zoo", runs=3, **options)
    report = generate(toy(), tmp_path / "zoo", runs=None, limit_seconds=1.5, **options)
    assert (report.stopped, report.remaining) == ("time limit", 0)
    assert report.runs > 6 and report.seconds < 10
    ids = Zoo.open(tmp_path / "zoo").run_ids
    assert list(ids) == [f"toy-s0-{i:07d}" for i in range(len(ids))]


@pytest.mark.parametrize(
    ("there", "runs", "size", "group", "expected"),
    [
        ([], 5, 2, 1, [(0, 2), (2, 4), (4, 5)]),
        ([(0, 2), (4, 5)], 9, 2, 1, [(2, 4), (5, 6), (6, 8), (8, 9)]),
        ([(0, 7)], 20, 12, 4, [(7, 8), (8, 12), (12, 20)]),
        ([(0, 2), (8, 10)], 4, 2, 1, [(2, 4)]),
        ([(0, 9)], 4, 2, 1, []),
        ([(1, 3)], None, 4, 1, [(0, 1), (3, 4), (4, 8), (8, 12)]),
    ],
)
def test_chunks_fill_the_gaps(there, runs, size, group, expected):
    found = missing([range(*part) for part in there], runs, size, group)
    assert [(part.start, part.stop) for part in itertools.islice(found, 4)] == expected


def test_the_time_limit_leaves_whole_chunks(tmp_path):
    report = generate(toy(), tmp_path / "zoo", runs=6, chunk=2, strategy="loop", limit_seconds=1e-9, progress=False)
    assert (report.stopped, report.runs, report.remaining) == ("time limit", 0, 6)


def test_runs_that_diverge_are_dropped_and_counted(tmp_path):
    def network():
        net = Mlp(12, 6, 4)
        if torch.rand(()) < 0.5:
            nn.init.constant_(net.fc1.bias, float("inf"))
        return net

    report = generate(toy(network), tmp_path / "zoo", runs=20, chunk=5, strategy="stacked", progress=False)
    zoo = Zoo.open(tmp_path / "zoo")
    assert 0 < report.dropped < 20
    assert report.runs + report.dropped == 20
    assert len(zoo) == report.runs
    assert zoo.verify().problems == ()
    again = generate(toy(network), tmp_path / "zoo", runs=20, chunk=5, strategy="stacked", progress=False)
    assert (again.runs, again.dropped, again.remaining) == (report.runs, report.dropped, 0)


def batch_norm():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))


def with_dropout():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Dropout(0.5), nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("task", "options", "match"),
    [
        ("digit", {}, "did you mean 'digits'"),
        ("digits", {"runs": 0}, "runs must be at least 1, got 0"),
        ("digits", {"share_batches": 0}, "share_batches must be at least 1, got 0"),
        ("digits", {"steps": -1}, "steps must be at least 1, got -1"),
        ("digits", {"chunk": 0}, "chunk must be at least 1, got 0"),
        ("digits", {"save_count": 1}, r"save_count must be 2 to steps \+ 1 = 1001, got 1"),
        ("digits", {"save_points": "log"}, "save_points must be one of .*, got 'log'"),
        ("digits", {"strategy": "fast"}, "strategy must be one of auto, stacked, vmap, loop .*, got 'fast'"),
        ("digits", {"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
        ("digits", {"dtype": "int8"}, "dtype must be one of float32, float64, got 'int8'"),
        (toy(batch=64), {}, "a batch of 64 needs as many images, got 50"),
        (toy(batch_norm), {}, "buffer '2.running_mean'"),
        (toy(with_dropout), {}, "module '2': runs of networks with dropout"),
        (toy(Cnn, (3, 6, 6)), {"strategy": "stacked"}, "strategy must be one of auto, vmap, loop"),
    ],
)
def test_bad_options_are_named_and_nothing_is_left(task, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        generate(task, tmp_path / "zoo", **{"runs": 3, "progress": False} | options)
    assert not list(tmp_path.iterdir())


def test_cuda_without_cuda_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda': no CUDA device is available here"):
        generate(toy(), tmp_path / "zoo", runs=1, device="cuda")


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"gpt-diffusion\[ray\]"):
        generate(toy(), tmp_path / "zoo", runs=1, ray=True)
    assert not list(tmp_path.iterdir())


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="MNIST: no data folder given"):
        generate("mnist", tmp_path / "zoo", runs=1)


def test_folders_that_cannot_hold_the_zoo_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        generate(toy(), tmp_path / "file" / "zoo", runs=1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="is not writable; choose another folder"):
        generate(toy(), tmp_path / "zoo", runs=1)


@pytest.mark.parametrize(
    ("task", "options", "match"),
    [
        (toy(name="other_loss"), {}, "task 'toy' there, 'other' asked for"),
        (toy(), {"steps": 20}, "steps 30 there, 20 asked for"),
        (toy(), {"strategy": "vmap"}, "strategy 'loop' there, 'vmap' asked for"),
        (toy(lambda: Mlp(12, 5, 4)), {}, "layout"),
    ],
)
def test_a_zoo_made_with_other_options_is_not_touched(task, options, match, tmp_path):
    basis = {"runs": 2, "strategy": "loop", "progress": False}
    generate(toy(), tmp_path / "zoo", **basis)
    before = contents(tmp_path / "zoo")
    with pytest.raises(ValueError, match=match):
        generate(task, tmp_path / "zoo", **basis | options)
    assert before[0] == contents(tmp_path / "zoo")[0]
    assert generate(toy(name="toy_error"), tmp_path / "zoo", **basis).runs == 2  # the metric does not matter


def test_given_starts_are_trained_as_generated_runs_are(tmp_path):
    """Training the stored initialisations with the zoo's seed gives the stored ends; another seed, other ends."""
    generate("digits", tmp_path / "zoo", runs=5, steps=30, save_count=3, strategy="stacked", progress=False, seed=4)
    zoo, runs = Zoo.open(tmp_path / "zoo"), list(range(5))
    starts, ends = zoo.params.gather(runs, [0] * 5), zoo.params.gather(runs, [-1] * 5)
    task = get_task("digits")
    torch.testing.assert_close(train_from(task, starts, seed=4, steps=30), ends, rtol=1e-5, atol=1e-5)
    other = train_from(task, starts, seed=5, steps=30)
    assert (other - ends).norm(dim=1).min() > 0.01
    with pytest.raises(ValueError, match=r"starts: expected \(n, 760\), got \(5, 3\)"):
        train_from(task, torch.zeros(5, 3), seed=0)


def test_a_process_that_comes_second_takes_over_the_strategy_of_the_first(tmp_path, monkeypatch):
    """While it measures, another one makes the zoo."""
    folder, options = tmp_path / "zoo", {"chunk": 2, "progress": False}

    def probe(work, names):
        generate(toy(), folder, runs=2, strategy="loop", **options)
        return dict.fromkeys(names, 1.0) | {"vmap": 5.0}

    monkeypatch.setattr(supervised, "probe", probe)
    report = generate(toy(), folder, runs=2, seed=1, **options)
    assert (report.runs, report.strategy) == (4, "loop")
