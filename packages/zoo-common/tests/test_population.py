import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo_common.population import Population
from zoo_common.tasks import Cnn, Mlp


class Odd(nn.Module):
    """Not a chain: a skip connection, so that the general path is taken."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.b(x + torch.tanh(self.a(x)))


def chain():
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 7), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(7, 4, bias=False))


def normed():
    """A floating-point buffer in the vector, an integer one beside it."""
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


NETWORKS = {
    "mlp": (lambda: Mlp(9, 5, 4), (9,), True),
    "images": (lambda: Mlp(8, 5, 4), (2, 2, 2), True),
    "chain": (chain, (2, 3), True),
    "cnn": (Cnn, (3, 6, 6), False),
    "odd": (Odd, (5,), False),
    "normed": (normed, (5,), False),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    make, shape, fast = NETWORKS[request.param]
    torch.manual_seed(0)
    net = make().double().eval()
    population = Population(net)
    assert (population.chain is not None) == fast
    vectors = population.layout.flatten(net) * (1 + 0.3 * torch.rand(7, population.layout.size, dtype=torch.float64))
    return net, population, vectors, torch.randn(7, 11, *shape, dtype=torch.float64)


def alone(net, population, vector, x):
    population.layout.load_into(net, vector)
    with torch.no_grad():
        return net(x)


def test_shared_and_own_inputs_equal_single_networks(case):
    net, population, vectors, x = case
    shared = torch.stack([alone(net, population, v, x[0]) for v in vectors])
    torch.testing.assert_close(population(vectors, x[0]), shared, rtol=1e-12, atol=1e-12)
    own = torch.stack([alone(net, population, v, inputs) for v, inputs in zip(vectors, x, strict=True)])
    torch.testing.assert_close(population(vectors, x, own=True), own, rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_single_networks(case):
    net, population, vectors, x = case
    vectors.requires_grad_()
    population(vectors, x[0]).square().sum().backward()
    for i in (0, 3):
        population.layout.load_into(net, vectors[i])
        net.zero_grad()
        net(x[0]).square().sum().backward()
        for name, parameter in net.named_parameters():
            got = population.layout.unflatten(vectors.grad[i])[name]
            torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", [1, 3000, 2**25])
def test_metrics_equal_single_networks_for_every_chunk(case, memory, monkeypatch):
    monkeypatch.setattr("zoo_common.population.CHUNK_BYTES", memory)
    net, population, vectors, x = case
    labels = torch.arange(11) % 4
    metrics = population.metrics(vectors, x[0], labels)
    for i, vector in enumerate(vectors):
        logits = alone(net, population, vector, x[0])
        wrong = (logits.argmax(1) != labels).double().mean().item()
        assert metrics.loss[i].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)
        assert metrics.error[i].item() == pytest.approx(100 * wrong)
        assert metrics.accuracy[i].item() == pytest.approx(1 - wrong)


def test_a_network_with_equal_logits_predicts_the_first_class():
    population = Population(Mlp(4, 3, 5))
    labels = torch.tensor([0, 1, 2, 3])
    assert population.metrics(torch.zeros(1, population.layout.size), torch.randn(4, 4), labels).error.item() == 75


def test_batch_norm_stays_in_evaluation_mode(case):
    net, population, vectors, x = case
    net.train()
    torch.testing.assert_close(Population(net)(vectors, x[0]), population(vectors, x[0]))


def test_wrong_shapes_are_named():
    population = Population(Mlp(4, 3, 5))
    with pytest.raises(ValueError, match=r"\(n, 35\), got \(2, 9\)"):
        population(torch.zeros(2, 9), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="2 networks need as many batches of their own, got 3"):
        population(torch.zeros(2, 35), torch.zeros(3, 1, 4), own=True)
