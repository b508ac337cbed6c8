"""The stand-in for a GPU refuses what CUDA refuses, and nothing else."""

import pytest
import torch
from support.elsewhere import elsewhere
from torch import nn


def test_tensors_of_two_devices_do_not_mix():
    with elsewhere() as device:
        ours, others = torch.ones(3, 4, device=device), torch.ones(3, 4)
        assert ours.device == (ours @ ours.T).device == torch.zeros_like(ours).device == device
        assert (ours + 1).sum().item() == 24 and (ours * torch.tensor(2.0)).cpu().equal(2 * others)
        assert ours[torch.tensor([0, 2])].tolist() == ours[[0, 2]].tolist() == [[1.0] * 4] * 2
        for mixed in (
            lambda: ours + others, lambda: ours @ others.T, lambda: others[ours.long()], lambda: torch.cat([ours, others]),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="tensors on lazy and on the CPU"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            ours.numpy()


def test_random_numbers_need_the_generator_of_their_device():
    with elsewhere() as device:
        for place, other in (device, "cpu"), ("cpu", device):
            with pytest.raises(RuntimeError, match="the generator is of another device"):
                torch.randn(3, device=place, generator=torch.Generator(other))
        generator = torch.Generator(device).manual_seed(0)
        assert isinstance(generator, torch.Generator)
        assert torch.randn(3, device=generator.device, generator=generator).device == device


def test_a_network_learns_there_as_on_the_cpu():
    def trained(device):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        for _ in range(3):
            net(torch.ones(3, 4, device=device)).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
        return [p.detach().cpu() for p in net.parameters()]

    expected = trained("cpu")
    with elsewhere() as device:
        torch.testing.assert_close(trained(device), expected)
