import pytest
import torch
from ghn import adjust_net, capacity, num_valid_nodes, resolve_model
from torch import nn


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "densenet121",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "vgg11",
        "mnasnet0_5",
        "convnext_tiny",
        "googlenet",
    ],
)
def test_adjusted_classifiers_take_small_images(name):
    net = resolve_model(name, num_classes=10).eval()
    assert adjust_net(net) is net and net.expected_input_sz == 32
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_first_kernels_keep_their_centre():
    net = resolve_model("resnet18")
    before = net.conv1.weight.detach().clone()
    adjust_net(net)
    torch.testing.assert_close(net.conv1.weight.detach(), before[:, :, 2:5, 2:5], rtol=0, atol=0)
    assert net.conv1.stride == net.conv1.padding == (1, 1) and isinstance(net.maxpool, nn.Identity)
    once = net.conv1.weight.detach().clone()
    adjust_net(net)  # published code cuts a 3 x 3 kernel to nothing
    torch.testing.assert_close(net.conv1.weight.detach(), once, rtol=0, atol=0)


def test_large_images_and_other_models_change_nothing():
    net = adjust_net(resolve_model("resnet18"), large_input=True)
    assert net.expected_input_sz == 224 and net.conv1.kernel_size == (7, 7)
    with pytest.warns(UserWarning, match="Linear has no adjustment"):
        adjust_net(nn.Linear(2, 2))


def test_capacity_counts_tensors_and_scalars():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    assert capacity(net) == (4, 14)
    net[0].requires_grad_(False)
    assert capacity(net) == (2, 6) and capacity(net, is_grad=False) == (4, 14)
    light = nn.Module()
    light.weight, light.bias = (4, 3), [4]
    assert capacity(light) == (2, 16)


def test_valid_nodes_are_those_that_have_gradients():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1))
    net.unused = nn.Linear(2, 2)
    for p in net.parameters():
        p.data.fill_(0.5)  # no dead units
    net.forward = lambda x: net[2](net[1](net[0](x)))
    assert num_valid_nodes(net, torch.ones(1, 3, 4, 4)) == 4
    net[2].weight.data.zero_()
    assert num_valid_nodes(net, torch.ones(1, 3, 4, 4)) == 2
    net[2].weight.data.fill_(torch.nan)
    assert num_valid_nodes(net, torch.ones(1, 3, 4, 4)) == -1
    assert all(p.grad is None for p in net.parameters())
