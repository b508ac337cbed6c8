"""Infinite nets of the golden recipes."""

import torch
from pilimit import InfMLP, PiSGD, clip_grad_norm_, param_groups
from torch.nn import functional as F

from support.golden import fill


def stats(stored):
    """A stored summary under the names of :func:`support.golden.assert_stats`."""
    return stored | {"first": stored["first8"], "last": stored["last8"]}


def golden_net(config, dtype=torch.float64):
    """The net of a recipe's case, its parameters filled by name."""
    case, d_in, r, d_out, L = (config[key] for key in ("case", "d_in", "r", "d_out", "L"))
    count = config.get("M0", r)
    alphas = ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")
    options = {key: config[key] for key in alphas if key in config}
    net = InfMLP(d_in, d_out, r, L, **options, layernorm=config.get("layernorm", False), dtype=torch.float64)
    state = net.state_dict()
    for name, value in state.items():
        if value.ndim == 0:
            continue
        number, kind = int(name.split(".")[1]), name.split(".")[2]
        if kind == "Amult":
            filled = 1 + fill(f"{case}:{name}", (count,), 0.1)
        elif kind == "B":
            rows = fill(f"{case}:{name}", (count, r)).double()
            filled = (rows / rows.norm(dim=1, keepdim=True)).float()
        elif kind == "bias":
            filled = fill(f"{case}:{name}", value.shape, 0.1)
        else:
            shape = (d_in, r) if number == 0 else (count, value.shape[1])
            scale = d_in**-0.5 if number == 0 else count**-0.5 if number <= L else 1 / count
            filled = fill(f"{case}:{name}", shape, scale)
            if number == L + 1 and config.get("zero_readout"):
                filled = filled * 0
        state[name] = filled.double()
    net.load_state_dict(state)
    return net.to(dtype)


def golden_loss(config, net, t):
    """Loss of the training step ``t``, and the outputs."""
    case, batch, d_out = config["case"], config["batch"], config["d_out"]
    output = net(fill(f"{case}:X:{t}", (batch, config["d_in"])).to(net.dtype))
    output.retain_grad()
    if config.get("loss") == "mse_mean":
        return F.mse_loss(output, fill(f"{case}:Y:{t}", (batch, d_out)).to(net.dtype)), output
    i = torch.arange(batch)
    target = (3 * t + 2 * i + (i * i) % 3) % d_out
    return F.cross_entropy(output.to(torch.promote_types(net.dtype, torch.float32)), target), output


def golden_optimizer(config, net):
    """The optimizer of a case, with the quirks of the published one."""
    keys = ("first_layer_lr_mult", "last_layer_lr_mult", "bias_lr_mult")
    groups = param_groups(net, **{key: config.get(key, 1.0) for key in keys})
    return PiSGD(
        groups, config["lr"], config.get("momentum", 0.0), config.get("dampening", 0.0), config.get("wd", 0.0),
        apply_lr_mult_to_wd=config.get("apply_lr_mult_to_wd", True), legacy_momentum_init=True,
    )  # fmt: skip


def golden_step(config, net, optimizer, t):
    """One training step; returns the loss."""
    optimizer.zero_grad()
    loss, _ = golden_loss(config, net, t)
    loss.backward()
    golden_clip(config, net)
    optimizer.step()
    return loss.item()


def golden_clip(config, net):
    """Clip as the case says; returns the total norm."""
    options = {"per_param": config.get("gclip_per_param", False)}
    return clip_grad_norm_(
        net.parameters(),
        config.get("gclip", 0.0),
        exclude_last_layer=config.get("gclip_exclude_last_layer", False),
        **options,
    )
