"""Own folders: exact, incremental, safe against kills and damage; published and hostile files."""

import os
import pickle

import pytest
import torch
from pilimit import InfMLP, PiSGD, load_metadata, load_net, load_optimizer, save_net
from support.reliability import flip_bit, truncate
from torch.nn import functional as F


def make(seed=0, **options):
    options = {"depth": 2, "bias_alpha": 0.5, "dtype": torch.float64} | options
    return InfMLP(6, 3, 5, generator=torch.Generator().manual_seed(seed), **options)


def train(net, optimizer, steps=3, first=0):
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(4, 6, generator=generator, dtype=net.dtype)
        optimizer.zero_grad()
        F.cross_entropy(net(x).float(), torch.arange(4) % 3).backward()
        optimizer.step()


def assert_same(a, b, tolerance=0.0):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


def files(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:torch.* on a CPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"momentum": 0.9, "weight_decay": 0.1}, {"weight_decay": 0.1}, {}])
@pytest.mark.parametrize("mapped", [False, True])
def test_training_goes_on_exactly_after_loading(tmp_path, dtype, options, mapped):
    net = make(dtype=dtype)
    optimizer = PiSGD(net.parameters(), 0.5, **options)
    for round_ in range(3):
        train(net, optimizer, first=3 * round_)
        save_net(tmp_path / "net", net, optimizer=optimizer, metadata={"step": 3 * round_ + 3})
    copy = load_net(tmp_path / "net", mapped=mapped)
    assert_same(net, copy)
    resumed = PiSGD(copy.parameters(), 9.0, **options)
    load_optimizer(tmp_path / "net", resumed)
    train(net, optimizer, first=9)
    train(copy, resumed, first=9)
    assert_same(net, copy, 10 * torch.finfo(dtype).eps if mapped else 0.0)
    assert load_metadata(tmp_path / "net") == {"step": 9}


def test_a_save_writes_new_rows_only(tmp_path):
    net = make()
    for layer in net.infinite_layers():
        rows = torch.randn(20_000, 8, dtype=torch.float64)
        layer.atoms.append(rows[:, : layer.n_out], F.normalize(rows[:, : layer.n_in]), 1e-5)
    optimizer = PiSGD(net.parameters(), 0.5, weight_decay=0.01)
    save_net(tmp_path, net)
    before = files(tmp_path)
    for first in range(0, 6, 2):
        train(net, optimizer, 2, first)
        save_net(tmp_path, net)
    after = files(tmp_path)
    assert sum(size for name, size in after.items() if name not in before or name == "net.safetensors") < 20_000
    assert len(after) == 5
    assert all(name in after for name in before)
    assert_same(net, load_net(tmp_path))


def test_nets_that_share_a_past_do_not_mix_in_one_folder(tmp_path):
    net = make()
    save_net(tmp_path, net)
    first, second = load_net(tmp_path), load_net(tmp_path)
    for seed, copy in ((10, first), (20, second)):
        train(copy, PiSGD(copy.parameters(), 0.5), 2 + seed // 10, seed)
        save_net(tmp_path, copy)
        assert_same(copy, load_net(tmp_path))
    save_net(tmp_path, first)
    assert_same(first, load_net(tmp_path))


def test_a_save_that_fails_leaves_the_state_before(tmp_path, monkeypatch):
    net = make()
    optimizer = PiSGD(net.parameters(), 0.5)
    train(net, optimizer)
    save_net(tmp_path, net, optimizer=optimizer)
    saved = load_net(tmp_path)
    train(net, optimizer, 2)
    real, calls = os.replace, []
    for fatal in (0, 1, 1):  # what was written stays: the atoms of one layer, those of the other, then the net itself

        def replace(a, b, fatal=fatal):
            calls.append(b)
            if len(calls) > fatal:
                raise OSError(28, "No space left on device", str(b))
            real(a, b)

        calls.clear()
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="No space left"):
            save_net(tmp_path, net, optimizer=optimizer)
        monkeypatch.undo()
        assert_same(saved, load_net(tmp_path))
    save_net(tmp_path, net, optimizer=optimizer)
    assert_same(net, load_net(tmp_path))
    assert len(files(tmp_path)) == 3


def test_damage_is_found_and_named(tmp_path):
    net = make()
    save_net(tmp_path, net)
    atoms = next(tmp_path.glob("atoms-*"))
    content = atoms.read_bytes()
    flip_bit(atoms, seed=3)
    with pytest.raises(ValueError, match="damaged"):
        load_net(tmp_path)
    atoms.write_bytes(content)
    truncate(atoms)
    for mapped in (False, True):
        with pytest.raises(ValueError, match=r"atoms-.* is truncated or damaged"):
            load_net(tmp_path, mapped=mapped)
    atoms.unlink()
    with pytest.raises(FileNotFoundError, match="atoms-"):
        load_net(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_net(tmp_path / "absent")


def test_mapped_rows_stay_in_their_files(tmp_path):
    net = make()
    train(net, PiSGD(net.parameters(), 0.5))
    save_net(tmp_path, net)
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    copy = load_net(tmp_path, mapped=True)
    for layer in copy.infinite_layers():
        size = (tmp_path / layer.atoms.segments[0].name).stat().st_size
        assert layer.atoms.blocks[0].A.untyped_storage().nbytes() == size
    train(copy, PiSGD(copy.parameters(), 0.5, momentum=0.9))
    assert content == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_state_without_optimizer_is_named(tmp_path):
    net = make()
    save_net(tmp_path, net)
    with pytest.raises(ValueError, match="saved without an optimizer"):
        load_optimizer(tmp_path, PiSGD(net.parameters(), 0.1))


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


def test_published_files_run_no_code_and_other_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"layers.0.A": Harmful()}, tmp_path / "harm.th")
    with pytest.raises(ValueError, match="system"):
        load_net(tmp_path / "harm.th")
    (tmp_path / "object.th").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="system"):
        load_net(tmp_path / "object.th")
    assert not (tmp_path / "harm").exists()
    for content in ([1, 2], {"a": torch.ones(2)}, {"As": {}}, {"layers.0.A": torch.ones(2, 2)}):
        torch.save(content, tmp_path / "other.th")
        with pytest.raises(ValueError, match=r"other\.th holds"):
            load_net(tmp_path / "other.th")
    state = make().state_dict()
    torch.save(state, tmp_path / "whole.th")
    assert_same(make(), load_net(tmp_path / "whole.th"))
    truncate(tmp_path / "whole.th")
    with pytest.raises(ValueError, match=r"whole\.th is damaged"):
        load_net(tmp_path / "whole.th")


def test_library_files_without_effective_biases_load(tmp_path):
    net = make(bias_alpha=0)
    state = net.state_dict() | {"layers.1.bias": torch.ones(5), "layers.2.bias": torch.ones(3)}
    torch.save(state, tmp_path / "old.th")
    assert_same(net, load_net(tmp_path / "old.th"))
