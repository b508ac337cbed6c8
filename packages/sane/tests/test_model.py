"""A model: files, embeddings by full attention and by windows, published files, diagnosis of planted faults."""

import json

import pytest
import torch
from safetensors.torch import save_file
from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.embedding import embed
from sane.model import Halo, SaneModel, load_model, load_published
from sane.networks import build_network
from sane.normalization import Normalization
from sane.preparation import open_prepared
from sane.reconstruction import layer_reports, reconstruct
from support.autoencoders import CNN, small_model
from torch import nn
from zoo_common import ChannelTokenizer, ParameterLayout, Zoo


@pytest.fixture(scope="module")
def prepared(workshop):
    return open_prepared(workshop / "prepared.safetensors")


def test_a_model_is_read_back_bit_by_bit(model, prepared, tmp_path):
    model.save(tmp_path / "copy.safetensors")
    again, vectors = load_model(tmp_path / "copy.safetensors"), prepared.vectors("test", slice(None))
    assert torch.equal(again.embed(vectors), model.embed(vectors))
    assert torch.equal(again.decode(again.encode(vectors)), model.decode(model.encode(vectors)))
    assert again.facts == model.facts


def test_a_damaged_or_foreign_file_is_named(workshop, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((workshop / "results/small/model.safetensors").read_bytes()[:-9])
    torch.save({}, tmp_path / "state.pt")
    cases = ((tmp_path, "model.safetensors"), (tmp_path / "absent", "there is no model"))
    for path, match in (*cases, (tmp_path / "state.pt", "a file of torch: give model.safetensors")):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            load_model(path)


def test_windows_with_all_the_context_are_full_attention_and_others_are_close(model, prepared):
    vectors = prepared.vectors("test", slice(0, 3))
    count = model.tokenizer.shape[0]
    torch.testing.assert_close(model.embed(vectors, Halo(count, 5)), model.embed(vectors), rtol=1e-4, atol=1e-5)
    assert 0.5 < model.compare(vectors, Halo(16, 8)) <= 1
    with pytest.raises(ValueError, match=r"halo \(8\) must be from 0 to below the window \(8\)"):
        Halo(8, 8)


def test_full_attention_of_a_long_sequence_keeps_no_square_matrix():
    """8,000 tokens: a matrix of all pairs would take 256 MB for each of the two heads."""
    import resource

    config = AutoencoderConfig(
        token_size=4, max_positions=(8_000, 2, 2), d_model=16, heads=2, layers=1, latent=2, window=4
    )
    autoencoder = Autoencoder(config).eval()
    p = torch.zeros(1, 8_000, 3, dtype=torch.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        autoencoder.encode(torch.randn(1, 8_000, 4), p)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_zoo_a_folder_and_a_file_have_the_same_embeddings(model, workshop, tmp_path):
    zoo = Zoo.open(workshop / "zoo")
    whole = embed(model, workshop / "zoo")
    assert whole.runs == [run for run in zoo.run_ids for _ in range(3)] and whole.steps == [0, 1, 2] * len(zoo)
    assert whole.method == "full attention" and whole.cosine is None
    for k in range(2):
        torch.save(zoo.weights(k, 2), tmp_path / f"net{k}.pt")
    save_file(zoo.weights(2, 2), tmp_path / "net2.safetensors")
    files = embed(model, tmp_path)
    assert files.runs == ["net0", "net1", "net2"]
    torch.testing.assert_close(files.vectors, whole.vectors[[2, 5, 8]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embed(model, tmp_path / "net1.pt").vectors, files.vectors[1:2], rtol=1e-4, atol=1e-5)
    windows = embed(model, workshop / "zoo", halo=Halo(16, 8))
    assert "approximation" in windows.method and 0.5 < windows.cosine <= 1


def test_networks_that_are_not_finite_are_named(model, prepared, tmp_path):
    vector = prepared.reference.clone()
    vector[3] = torch.nan
    torch.save(model.tokenizer.layout.unflatten(vector), tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"broken\.pt has weights that are not finite: leave it out"):
        embed(model, tmp_path / "broken.pt")
    with pytest.raises(
        ValueError, match=r"nothing in .* can be embedded: .*broken\.pt has weights that are not finite"
    ):
        embed(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_any_precision_and_number_are_embedded(model, prepared, dtype):
    vectors = prepared.vectors("train", slice(0, 3)).to(dtype)
    expected = model.embed(vectors.float())
    assert torch.equal(model.embed(vectors), expected)
    torch.testing.assert_close(model.embed(vectors[:1]), expected[:1])
    assert model.decode(model.encode(vectors[:0])).shape == vectors[:0].shape
    for wrong in (vectors[0], vectors[:, :-1], vectors[None]):
        with pytest.raises(ValueError, match=r"expected checkpoints \(n, "):
            model.embed(wrong)
    with pytest.raises(ValueError, match=r"expected latents \(n, "):
        model.decode(model.encode(vectors)[0])


def test_a_device_that_is_not_there_is_named(workshop, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda': no CUDA device is available here"):
        load_model(workshop / "results" / "small", "cuda")


def test_a_file_without_floating_point_weights_is_named(model, prepared, tmp_path):
    state = model.tokenizer.layout.unflatten(prepared.reference)
    torch.save({name: tensor.long() for name, tensor in state.items()}, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"whole\.pt: no floating-point tensor"):
        embed(model, tmp_path / "whole.pt")


def test_files_of_a_folder_that_cannot_be_used_are_left_out_and_named(model, prepared, tmp_path):
    layout = model.tokenizer.layout
    state = layout.unflatten(prepared.reference)
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pt")
    torch.save({"epoch": 3, "model": state, "optimizer": {"state": {}}}, tmp_path / "nested.pt")
    torch.save(layout.unflatten(prepared.reference * torch.nan), tmp_path / "nan.pt")
    torch.save({**state, "epoch": 3}, tmp_path / "epoch.pt")
    torch.save({**state, layout.names[0]: torch.zeros(2)}, tmp_path / "shape.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "run").mkdir()
    for step, vector in enumerate((prepared.reference, prepared.reference * torch.inf, prepared.reference)):
        save_file(layout.unflatten(vector), tmp_path / "run" / f"net_{step}.safetensors")
    found = embed(model, tmp_path)
    assert (found.runs, found.steps) == (["half", "nested", "run", "run"], [0, 0, 0, 2])
    torch.testing.assert_close(found.vectors, found.vectors[1:2].expand(4, -1), rtol=1e-2, atol=1e-3)
    words = {
        "nan.pt": "not finite",
        "epoch.pt": "'epoch' is int",
        "shape.pt": "another layout",
        "junk.pt": "damaged",
        "run/net_1.safetensors": "not finite",
    }
    assert found.left_out.keys() == {str(tmp_path / name) for name in words}
    assert all(text in found.left_out[str(tmp_path / name)] for name, text in words.items())


def test_embeddings_do_not_depend_on_the_order_of_hidden_units(model, prepared, tmp_path):
    vector = prepared.zoo.params[0, 2][None]
    permuted = prepared.symmetry.permute(vector, torch.Generator().manual_seed(3))
    for k, one in enumerate((vector, permuted)):
        torch.save(prepared.zoo.layout.unflatten(one[0]), tmp_path / f"net{k}.pt")
    found = embed(model, tmp_path).vectors
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_networks_of_another_layout_are_named(model, tmp_path):
    other = build_network({**CNN, "model::o_dim": 7})
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"another layout \(module_list.11.weight: \(7, 20\) there, \(10, 20\) in the model"
    ):
        embed(model, tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="give a zoo, a folder"):
        embed(model, tmp_path / "absent")


def test_a_token_width_that_does_not_fit_is_named(model, prepared, tmp_path):
    _, other = small_model(tmp_path / "zoo")
    config = AutoencoderConfig(token_size=41, max_positions=(100, 10, 40), d_model=16, heads=2, layers=1)
    with pytest.raises(
        ValueError, match="takes tokens of 41 scalars, these have 40: prepare the zoo with token_size=41"
    ):
        SaneModel(Autoencoder(config), other.tokenizer, other.normalization, other.reference)


def published_file(path, prefix=""):
    config = {
        "ae:i_dim": 12, "ae:d_model": 16, "ae:nhead": 2, "ae:num_layers": 1, "ae:lat_dim": 4,
        "ae:transformer_type": "gpt2", "ae:max_positions": [30, 5, 9], "training::windowsize": 8,
    }  # fmt: skip
    sizes = AutoencoderConfig(12, (30, 5, 9), 8, 16, 2, 1, 4)
    autoencoder = Autoencoder(sizes).eval()
    state = {prefix + name: tensor for name, tensor in autoencoder.state_dict().items()}
    torch.save({"model": state, "optimizer": {}}, path / "state.pt")
    (path / "params.json").write_text(json.dumps(config))
    return autoencoder


def test_published_files_load_with_the_prefix_of_compiled_modules(tmp_path):
    expected = published_file(tmp_path, "_orig_mod.").state_dict()
    found = load_published(tmp_path / "state.pt", tmp_path / "params.json").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_published_files_of_another_size_are_refused_in_one_line(tmp_path):
    published_file(tmp_path)
    config = json.loads((tmp_path / "params.json").read_text()) | {"ae:lat_dim": 5, "ae:num_layers": 2}
    with pytest.raises(
        ValueError, match=r"missing transformer_encoder.transformer.1.*encoder_comp.weight: expected \(5, 16\)"
    ):
        load_published(tmp_path / "state.pt", config)
    torch.save({"model": {"tokenizer.weight": 3}}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"holds no autoencoder: 'tokenizer.weight' is int"):
        load_published(tmp_path / "state.pt", config)
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(ValueError, match=r"params.json is damaged"):
        load_published(tmp_path / "state.pt", tmp_path / "params.json")


def test_heads_may_have_an_odd_width():
    autoencoder = Autoencoder(AutoencoderConfig(5, (9, 4, 4), 6, d_model=12, heads=4, layers=1, latent=3))
    assert autoencoder(torch.ones(2, 6, 5), torch.zeros(2, 6, 3))[1].shape == (2, 6, 5)
    with pytest.raises(ValueError, match=r"d_model \(12\) must be even and a multiple of heads \(5\)"):
        AutoencoderConfig(5, (9, 4, 4), d_model=12, heads=5)


FAULTS = {
    "not finite": lambda w: w * torch.nan,
    "vanished": lambda w: w * 0,
    "blown up": lambda w: w * 5,
    "turned round": lambda w: -w,
    "wrong": lambda w: w.flip(-1),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layer", [0, 3])
def test_a_planted_fault_is_found_in_its_layer(prepared, fault, layer):
    torch.manual_seed(0)
    model = small_model_of(prepared)
    before = prepared.vectors("train", slice(0, 6))
    normalized = model.normalization.normalize(before)
    after = normalized + 0.2 * torch.randn(normalized.shape)
    name, bias = model.tokenizer.layers[layer].weight, model.tokenizer.layers[layer].bias
    for span in (model.tokenizer.layout.slices[name], model.tokenizer.layout.slices[bias]):
        after[:, span] = FAULTS[fault](after[:, span])
    reports = layer_reports(before, model.normalization.denormalize(after), model)
    assert {r.layer: r.finding for r in reports if r.finding != "fine"} == {name: fault}


def test_layers_of_which_nothing_comes_back_are_not_called_fine(prepared):
    torch.manual_seed(0)
    model = small_model_of(prepared)
    before = prepared.vectors("train", slice(0, 6))
    after = 0.1 * torch.randn(before.shape)
    reports = layer_reports(before, model.normalization.denormalize(after), model)
    assert {r.finding for r in reports} == {"lost"}


def small_model_of(prepared):
    config = AutoencoderConfig(40, prepared.max_positions, 16, 16, 2, 1, 4)
    return SaneModel(Autoencoder(config), prepared.tokenizer, prepared.normalization, prepared.reference)


def test_a_perfect_autoencoder_loses_nothing_and_a_broken_weight_is_seen(prepared):
    """Identity weights keep every token; breaking the position of one layer is found there."""
    model = small_model_of(prepared)
    vectors = prepared.vectors("train", slice(0, 6))
    model.encode = lambda v, halo=None: model.tokens(v)
    model.decode = lambda z, halo=None: model.vectors(z)
    accuracy = lambda v: -(v - vectors).square().mean(1)
    found = reconstruct(model, vectors, accuracy)
    assert not found.faulty and found.relative_error < 1e-5 and abs(found.accuracy_after) < 1e-10
    assert found.accuracy_conditioned is None
    bad = model.tokenizer.layers[2]

    def broken(z, halo=None):
        z = z.clone()
        z[:, bad.start : bad.stop] = 0
        return model.vectors(z)

    model.decode = broken
    found = reconstruct(model, vectors, accuracy)
    assert [report.layer for report in found.faulty] == [bad.weight]
    alone = {report.layer: report.accuracy for report in found.layers}
    assert min(alone, key=alone.get) == bad.weight


def test_decoded_variances_are_positive():
    layout = ParameterLayout.from_module(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    tokenizer = ChannelTokenizer.from_layout(layout, 4)
    config = AutoencoderConfig(4, tuple(int(n) + 1 for n in tokenizer.positions.amax(0)), 4, 16, 2, 1, 4)
    normalization = Normalization("none", {}, layout)
    model = SaneModel(Autoencoder(config), tokenizer, normalization, torch.zeros(layout.size))
    vectors = model.vectors(torch.full((2, *tokenizer.shape), -1.0))
    variances = vectors[:, layout.slices["1.running_var"]]
    assert (variances > 0).all() and (vectors < 0).sum() == 2 * (layout.size - 4)
