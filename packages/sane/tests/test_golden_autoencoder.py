"""The autoencoder: published keys, sizes, outputs, losses and optimizer steps."""

import re

import pytest
import torch
from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.losses import Objective, explained_variance, nt_xent, positive_similarity, reconstruction
from sane.optimization import OptimizationConfig, clip_gradients, make_optimizer, make_schedule
from support.autoencoders import filled_autoencoder_state, recipe_positions
from support.golden import assert_close, assert_stats, fill


def config_of(published):
    return AutoencoderConfig(
        token_size=published["ae:i_dim"],
        max_positions=tuple(published["ae:max_positions"]),
        window=published["training::windowsize"],
        d_model=published["ae:d_model"],
        heads=published["ae:nhead"],
        layers=published["ae:num_layers"],
        latent=published["ae:lat_dim"],
        dropout=published["ae:dropout"],
        kind={"gpt2": "gpt2", "pytorch": "legacy_pytorch"}[published["ae:transformer_type"]],
    )


@pytest.mark.golden("ae.json", cases="cases")
def test_keys_and_outputs_are_the_published_ones(golden):
    case, arrays = golden.case, golden.tensors()
    config = config_of(case["config"])
    with torch.device("meta"):
        model = Autoencoder(config).eval()
    assert sum(p.numel() for p in model.parameters()) == case["n_params"]
    keys = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if "state_dict_keys" in case:
        assert keys == case["state_dict_keys"]
        assert list(keys) == list(case["state_dict_keys"])
    if not case.keys() & {"tag", "z"}:  # the shapes only
        assert "state_dict_keys" in case
        return
    tag, shape = case["tag"], (case["batch"], case["seq_len"])
    model.load_state_dict(filled_autoencoder_state(model, tag, case["scale"]), assign=True)
    x = fill(tag + "x", (*shape, config.token_size))
    p = recipe_positions(tag + "p", config.max_positions, shape)
    with torch.no_grad():
        z = model.encode(x, p)
        results = {"z": z, "y": model.decode(z, p), "embedding_mean_over_tokens": model.embed(x, p)}
        if shape[1] == config.window:
            results["projection"] = model.project(z)
        else:
            assert case["projection"] is None
    for name, result in results.items():
        assert_stats(result, case[name], "sane/forward", name)
    stored = case["z_token_l2_batch0"]
    assert_close(z[0].norm(dim=1)[: len(stored)], stored, "sane/forward", "norms of latents")
    for name, result in (("z", z), ("y", results["y"]), ("zp", results.get("projection"))):
        stored = arrays.get(f"{tag.rstrip('/')}.{name}")
        if stored is not None and result is not None and stored.shape == result.shape:  # cases share tags
            assert_close(result, stored, "sane/forward", name)


def loss_inputs(recipe):
    """The tensors zi, zj, y, m, t of ``zi=fill('NAME',(a,b),SCALE), zj likewise, ..., m=fill('NAME',same,1)>-0.5``."""
    found, shape = {}, ()
    for key, name, sizes, scale in re.findall(r"(\w+)=fill\('([^']+)',\s*(\([^)]*\)|same[^,]*),\s*([\d.]+)\)", recipe):
        shape = shape if sizes.startswith("same") else [int(size) for size in re.findall(r"\d+", sizes)]
        found[key] = fill(name, shape, float(scale))
        if f"{key[:-1]}j likewise" in recipe:
            found[key[:-1] + "j"] = fill(name[:-1] + "j", shape, float(scale))
    m = found["m"] > float(re.search(r"\)>(-?[\d.]+)", recipe)[1])
    return found["zi"], found["zj"], found["y"], found["t"] * m, m


@pytest.mark.golden("losses.json", cases="values")
def test_losses_are_the_published_ones(golden):
    case, kind = golden.case, golden.case["loss"]
    z_i, z_j, y, t, m = loss_inputs(golden.document["recipe"])
    if kind == "nt_xent":
        values = [nt_xent(z_i, z_j, case["temperature"]), nt_xent(z_i.relu(), z_j.relu(), case["temperature"])]
        assert_close(values, [case["value"], case["value_on_relu_inputs"]], "sane/loss")
    elif kind == "nt_xent_positive_only":
        assert_close(positive_similarity(z_i, z_j, case["temperature"], legacy=True), case["value"], "sane/loss")
    elif kind in ("masked_recon mean", "masked_recon sum"):
        assert_close(reconstruction(y, t, m, reduction=kind.split()[1]), case["value"], "sane/loss")
        if kind.endswith("mean") or "rsq" in case:
            assert_close(explained_variance(y, t, m), case["rsq"], "sane/loss")
    else:
        assert kind == "gamma", f"unknown loss {kind!r}"
        options = {key: case[key] for key in ("gamma", "temperature", "z_var_penalty", "z_norm_penalty")}
        assert_terms(Objective(**options)(z_i, z_j, y, t, m), case, "sane/loss")


def assert_terms(terms, stored, tolerance):
    names = {"loss": "loss/loss", "contrast": "loss/loss_contrast", "reconstruction": "loss/loss_recon"}
    names |= {"rsq": "loss/rsq", "z_norm": "debug/z_norm", "z_var": "debug/z_var"}
    if terms.rsq.isnan():  # contrast only
        del names["rsq"]
    for ours, name in names.items():
        assert_close(getattr(terms, ours), stored[name], tolerance, name)


@pytest.mark.golden("train_steps.json", cases="runs", having="runs")
def test_optimizer_steps_are_the_published_ones(golden):
    case, published, tag = golden.case, golden.case["config"], golden.case["tag"]
    config = config_of(published)
    model = Autoencoder(config)
    model.load_state_dict(filled_autoencoder_state(model, tag, case["scale"]))
    optim = OptimizationConfig(
        optimizer=published["optim::optimizer"],
        lr=published["optim::lr"],
        weight_decay=published["optim::wd"],
        schedule={"OneCycleLR": "onecycle", None: "constant"}[published["optim::scheduler"]],
        clipping=published.get("training::gradient_clipping") or "none",
        clip=published.get("training::gradient_clipp_value", 5.0),
    )
    optimizer = make_optimizer(model, optim)
    steps = published["training::epochs_train"] * published["training::steps_per_epoch"]
    steps *= published.get("training::test_epochs", 1)
    schedule = make_schedule(optimizer, optim, steps)
    objective = Objective(gamma=published["training::gamma"], temperature=published["training::temperature"])
    shape = (published["trainset::batchsize"], config.window)
    for stored in case["steps"]:
        name = f"{tag}step{stored['step']}"
        mask = fill(f"{name}/m", (*shape, config.token_size)) > -0.5
        views = [fill(f"{name}/{k}/x", (*shape, config.token_size)) * mask for k in "ij"]
        p = recipe_positions(f"{name}/i/p", config.max_positions, shape).repeat(2, 1, 1)
        group = optimizer.param_groups[0]
        inertia = group["betas"][0] if "betas" in group else group["momentum"]
        assert_close(group["lr"], stored["lr_used"], "float64")
        assert_close(inertia, stored["beta1_used"], "float64")
        _, y, projected = model(torch.cat(views), p)
        terms = objective(*projected.chunk(2), y, torch.cat(views), mask.repeat(2, 1, 1))
        assert_terms(terms, stored, "sane/steps")
        optimizer.zero_grad()
        terms.loss.backward()
        clip_gradients(model, optim)
        optimizer.step()
        if schedule is not None and stored["step"] + 1 < steps:
            schedule.step()
    state = model.state_dict()
    for name, stats in case["params_after"].items():
        assert_stats(state[name], stats, "sane/steps", name)
    total = torch.stack([p.detach().double().square().sum() for p in model.parameters()]).sum().sqrt()
    assert_close(total, case["global_param_l2_after"], "sane/steps")
