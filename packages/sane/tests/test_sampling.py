"""Sampling: what the modes promise, strategies that keep the best, rivals, novelty, conditioning and fine-tuning."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from sane.comparison import compare_groups, nearest_members, novelty_report, rival_groups
from sane.networks import build_network
from sane.population import FineTuning, Networks, image_batches
from sane.preparation import PrepareConfig, prepare
from sane.sampling import KernelDensity, Sampler, random_anchors
from sane.sampling_commands import fresh_networks
from support.autoencoders import small_model, zoo_of_networks
from torch import nn
from zoo_common import ChannelTokenizer, Symmetry
from zoo_common.datasets import Part, Splits


def test_modes_draw_what_their_names_promise():
    anchors = torch.tensor([-10.0, 0.0, 10.0])[:, None, None].expand(3, 40, 6).contiguous()
    chosen = {m: KernelDensity(m, 0.1).draw(anchors, 8).div(10).round() for m in ("joint", "token", "individual")}
    assert all(len(x.unique()) == 1 for x in chosen["joint"])
    assert all(len(x.unique()) == 3 for x in chosen["token"])
    assert (chosen["token"] == chosen["token"][:, :, :1]).all()
    assert (chosen["individual"] == chosen["individual"][:, :, :1]).all(2).float().mean() < 0.05
    noise = (
        KernelDensity("token", 0.1).draw(anchors, 200)
        - 10 * KernelDensity("token", 0.1).draw(anchors, 200).div(10).round()
    )
    assert abs(noise.std() - 0.1) < 0.002


def test_a_relative_bandwidth_follows_the_spread_of_the_anchors():
    anchors = torch.randn(6, 20, 5) * torch.linspace(0, 3, 5)
    for shared in (False, True):
        drawn = KernelDensity("joint", 0.01, shared, relative=True).draw(anchors, 400)
        noise = drawn - anchors[torch.cdist(drawn.flatten(1), anchors.flatten(1)).argmin(1)]
        torch.testing.assert_close(noise.std(0), 0.01 * anchors.std(0, correction=0), rtol=0.2, atol=1e-6)


def test_draws_depend_on_the_seed_and_published_ones_do_not_mix_anchors():
    anchors = torch.randn(5, 10, 4)
    density = KernelDensity()
    assert torch.equal(density.draw(anchors, 3, 1), density.draw(anchors, 3, 1))
    assert not torch.equal(density.draw(anchors, 3, 1), density.draw(anchors, 3, 2))
    published = KernelDensity("individual", 0.2, shared_noise=True).draw(anchors, 4)
    shift = (published[:, None] - anchors).flatten(2)
    assert ((shift - shift[..., :1]).abs().amax(2) < 1e-5).any(1).all()


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    model, prepared = small_model(tmp_path_factory.mktemp("zoos") / "zoo")
    anchors = model.encode(prepared.vectors("train", slice(0, 6)))
    return Sampler(model, anchors, KernelDensity())


def score(vectors):
    return -vectors.square().sum(1)


def test_subsampling_keeps_the_best(sampler):
    drawn = sampler.plain(12, seed=3).vectors
    kept = sampler.subsampled(4, score, draws=12, seed=3)
    assert torch.equal(kept.scores, score(drawn).sort(descending=True)[0][:4])
    assert torch.equal(kept.vectors, drawn[score(drawn).argsort(descending=True)[:4]])


def test_a_score_that_is_no_number_is_the_worst(sampler):
    scores = torch.tensor([1.0, torch.nan, 3.0, 2.0])
    assert sampler.subsampled(2, lambda vectors: scores, draws=4).scores.tolist() == [3, 2]
    assert sampler.bootstrapped(2, lambda v: scores, draws=4, keep=1, iterations=1).scores.tolist() == [3, 2]


def test_bootstrapping_improves_and_gives_the_best_of_the_last_draw(sampler):
    found = sampler.bootstrapped(3, score, draws=16, keep=3, iterations=4, seed=0)
    assert len(found.rounds) == 4 and found.rounds[-1].kept_mean > found.rounds[0].kept_mean
    assert all(r.kept_mean >= r.dropped_mean for r in found.rounds)
    assert torch.equal(found.scores, found.scores.sort(descending=True)[0])
    free = Sampler(sampler.model, random_anchors(4, *sampler.anchors.shape[1:]), KernelDensity())
    assert free.bootstrapped(2, score, draws=4, keep=2, iterations=2).vectors.shape == (
        2,
        sampler.model.tokenizer.layout.size,
    )


def test_networks_are_decoded_alike_alone_and_together_in_windows_and_whole(sampler):
    from sane.model import Halo

    latents = sampler.density.draw(sampler.anchors, 5)
    together = sampler.decode(latents)
    alone = torch.cat([sampler.decode(z[None]) for z in latents])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    count = sampler.model.tokenizer.shape[0]
    whole = sampler.model.decode(latents, Halo(count, 1))
    torch.testing.assert_close(whole, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: KernelDensity("tokens"), "mode must be one of individual, token, joint, got 'tokens'"),
        (lambda s: KernelDensity(bandwidth=-1.0), "bandwidth must not be negative"),
        (lambda s: KernelDensity(bandwidth=float("nan")), "must be finite, got nan"),
        (lambda s: KernelDensity(bandwidth=float("inf")), "must be finite, got inf"),
        (lambda s: s.density.draw(s.anchors[:0], 1), "no anchors"),
        (lambda s: s.subsampled(4, score, draws=3), "draws must be at least 4, got 3"),
        (lambda s: s.bootstrapped(1, score, draws=4, keep=2, iterations=0), "iterations must be at least 1"),
        (lambda s: Sampler(s.model, s.anchors[..., :3], s.density), r"anchors must be latents \(a, "),
    ],
)
def test_bad_settings_are_named(sampler, call, match):
    with pytest.raises(ValueError, match=match):
        call(sampler)


class Net(nn.Module):
    """Batch norm and a dense layer, small enough to train one by one."""

    def __init__(self):
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(F.relu(self.bn(self.fc1(x))))


def part(n, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=rng)
    return Part(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def test_conditioning_and_fine_tuning_together_are_those_of_single_networks():
    torch.manual_seed(0)
    nets, data = [Net() for _ in range(3)], part(64, 0)
    networks = Networks(nets[0])
    vectors = networks.layout.stack(nets).detach()
    batches = list(image_batches(data, 16, 3, seed=1))
    conditioned = networks.condition(vectors, batches).vectors
    config = FineTuning(epochs=2, batch=16, lr=0.05, optimizer="sgd", schedule="onecycle")
    tuned = networks.finetune(vectors, data, config, seed=7)
    for net, bn, ft in zip(nets, conditioned, tuned, strict=True):
        single = Net()
        single.load_state_dict(net.state_dict())
        single.train()
        with torch.no_grad():
            for x in batches:
                single(x)
        torch.testing.assert_close(networks.layout.flatten(single), bn)
        single.load_state_dict(net.state_dict())
        optimizer = torch.optim.SGD(single.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=8)
        rng, done = torch.Generator().manual_seed(7), 0
        for _ in range(2):
            order = torch.randperm(64, generator=rng)
            for rows in order.split(16):
                loss = F.cross_entropy(single(data.images[rows]), data.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done < 8:
                    schedule.step()
        torch.testing.assert_close(networks.layout.flatten(single).detach(), ft, rtol=1e-4, atol=1e-5)


def test_what_is_computed_at_once_is_bounded_by_memory_and_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    nets, data = [Net() for _ in range(5)], part(64, 0)
    config = FineTuning(
        epochs=2, batch=16, lr=0.05, optimizer="sgd"
    )  # Adam enlarges rounding where there is no gradient
    splits = Splits(data, part(64, 1), part(64, 2))

    def results():
        networks, seen = Networks(nets[0]), []
        forward = networks.train_forward
        monkeypatch.setattr(networks, "train_forward", lambda v, x: seen.append(len(v)) or forward(v, x))
        vectors = networks.layout.stack(nets).detach()
        tuned, accuracies = networks.finetune_judged(vectors, splits, config, seed=7)
        conditioned = networks.condition(vectors, image_batches(data, 16, 2, seed=1)).vectors
        return seen, (tuned, conditioned, *accuracies.values()), networks.ensemble_accuracy(tuned, splits.test)

    (many, expected, ensemble), _ = results(), monkeypatch.setattr("sane.population._NUMBERS", 3000)
    few, found, same = results()
    assert set(many) == {5} and max(few) < 5 and ensemble == same
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_networks_that_are_not_finite_have_no_accuracy():
    networks, data = Networks(Net()), part(20, 0)
    vectors = networks.layout.flatten(Net()).detach().repeat(3, 1)
    vectors[1], vectors[2] = torch.nan, torch.inf
    found = networks.accuracy(vectors, Part(data.images, torch.zeros(20, dtype=torch.int64)))
    assert found[1:].tolist() == [0, 0]  # though the largest of NaN is class 0
    assert networks.ensemble_accuracy(vectors, Part(data.images, torch.zeros(20, dtype=torch.int64))) == 0


def test_an_ensemble_is_the_mean_of_logits_in_evaluation_mode():
    torch.manual_seed(0)
    nets, data = [Net().eval() for _ in range(3)], part(64, 0)
    networks = Networks(nets[0])
    with torch.no_grad():
        expected = (torch.stack([net(data.images) for net in nets]).mean(0).argmax(1) == data.labels).float().mean()
    assert networks.ensemble_accuracy(networks.layout.stack(nets).detach(), data) == pytest.approx(expected.item())


def test_rivals_have_the_names_the_noise_and_the_scores_they_claim():
    torch.manual_seed(0)
    nets = [Net() for _ in range(6)]
    networks = Networks(nets[0])
    anchors = networks.layout.stack(nets).detach()
    samples = anchors[:4] + 0.3 * torch.randn(4, anchors.shape[1])
    splits = Splits(part(64, 0), part(64, 1), part(64, 2))
    scores = networks.accuracy(anchors, splits.validation)
    tokenizer = ChannelTokenizer.from_layout(networks.layout)
    rivals = rival_groups(
        samples, anchors, scores, tokenizer, networks.layout.stack([Net() for _ in range(4)]).detach()
    )
    assert torch.equal(rivals["best anchor"][0], anchors[scores.argmax()])
    torch.testing.assert_close(rivals["average of anchors"][0], anchors.mean(0))
    span = networks.layout.slices["fc1.weight"]
    shift = torch.cdist(rivals["anchor + noise"][:, span], anchors[:, span]).amin(1)
    usual = torch.cdist(samples, anchors).argmin(1)
    expected = (samples - anchors[usual])[:, span].norm(dim=1).median()
    torch.testing.assert_close(shift, expected.expand(4), rtol=1e-4, atol=1e-5)
    table = compare_groups(networks, {"samples": samples, **rivals}, splits, FineTuning(epochs=2, batch=16, lr=0.01))
    assert [row.name for row in table] == ["samples", *rivals]
    direct = networks.accuracy(samples, splits.test)
    assert table[0].zero_shot == pytest.approx(direct.mean().item()) and len(table[0].finetuned) == 2
    assert table[-1].finetuned[-1] > table[-1].zero_shot
    config = FineTuning(epochs=2, batch=16, lr=0.01)
    alone = compare_groups(networks, {"samples": samples}, splits, config)[0]
    whole = networks.finetune(samples, splits.train, config)  # with one optimizer for all epochs
    assert alone.finetuned[1] == pytest.approx(networks.accuracy(whole, splits.test).mean().item())


def test_random_rivals_begin_as_the_runs_of_the_zoo_do(tmp_path):
    config = {"model::type": "CNN", "model::channels_in": 1, "model::o_dim": 10, "model::init_type": "normal"}
    prepared = prepare(zoo_of_networks(tmp_path / "zoo", config), PrepareConfig(token_size=40))
    first, second, *_ = fresh_networks(prepared, 3, seed=1)
    weight, other = (net.state_dict()["module_list.9.weight"] for net in (first, second))
    assert weight.std() == pytest.approx(1, abs=0.1) and not torch.equal(weight, other)
    assert (first.state_dict()["module_list.9.bias"] == 0.01).all()


def test_novelty_finds_permuted_copies():
    torch.manual_seed(0)
    config = {"model::type": "CNN", "model::channels_in": 1, "model::o_dim": 10}
    nets = [build_network(config) for _ in range(50)]
    symmetry = Symmetry.from_module(nets[0].eval(), torch.zeros(2, 1, 28, 28))
    members = symmetry.layout.stack(nets).detach()
    copies = symmetry.permute(members[:3], torch.Generator().manual_seed(0))
    fresh = symmetry.layout.stack([build_network(config) for _ in range(10)]).detach()
    # candidates are the nearest before alignment, as members and samples are in canonical form
    aligned = symmetry.align(members, members[0])
    copies, unseen = symmetry.align(copies, members[0]), symmetry.align(fresh, members[0])
    near = nearest_members(copies, lambda: aligned.split(20), symmetry)
    assert near.member.tolist() == [0, 1, 2] and near.distance.max() < 1e-5
    away = nearest_members(unseen, lambda: aligned.split(20), symmetry)
    report = novelty_report(near, away)
    assert report.nearer_than_unseen == 1 and report.unseen > 0.5
    assert novelty_report(away, away).nearer_than_unseen < 0.2
    with pytest.raises(ValueError, match="no members"):
        nearest_members(copies, list, symmetry)


def test_novelty_is_that_of_all_permutations_of_all_members():
    torch.manual_seed(0)
    config = {"model::type": "MLP", "model::i_dim": 4, "model::h_dim": [3], "model::o_dim": 2}
    nets = [build_network(config) for _ in range(70)]
    symmetry = Symmetry.from_module(nets[0].eval(), torch.zeros(2, 4))
    vectors = symmetry.layout.stack(nets).detach()
    vectors[:10] = vectors[10:20] + 1e-6 * torch.randn(10, vectors.shape[1])  # nearly copies
    orders = torch.tensor(list(itertools.permutations(range(3))))
    permuted = torch.stack([symmetry.apply(vectors[10:], [order.expand(60, 3)]) for order in orders])  # (6, 60, d)
    exact = (vectors[:10, None, None] - permuted).norm(dim=3).flatten(1).amin(1) / vectors[:10].norm(dim=1)
    found = nearest_members(vectors[:10], lambda: vectors[10:].split(30), symmetry)
    torch.testing.assert_close(found.distance, exact, rtol=1e-4, atol=0)
    assert found.member.tolist() == [*range(10)] and exact.max() < 1e-5
    away = nearest_members(vectors[10:15], lambda: vectors[15:].split(30), symmetry)
    exact = (vectors[10:15, None, None] - permuted[:, 5:]).norm(dim=3).flatten(1).amin(1)
    torch.testing.assert_close(away.distance, exact / vectors[10:15].norm(dim=1))
