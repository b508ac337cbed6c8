import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from gpt_diffusion.model import GptModel
from support.golden import assert_close, assert_stats, fill
from zoo_common.tokens import LayerTokenizer

SMALL = {
    "parameter_sizes": [12, 4, 8, 2],
    "split_policy": "chunk_within_layer",
    "chunk_size": 5,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "num_frequencies": 8,
    "max_freq_log2": 6,
    "absolute_loss_conditioning": True,
}
POLICIES = [
    ("chunk", 7),
    ("chunk", 1000),
    ("layer_by_layer", None),
    ("chunk_within_layer", 5),
    ("chunk_within_input", 7),
]


def golden_inputs(config):
    d, b, name = sum(config["parameter_sizes"]), config["B"], config["name"]
    x, x_prev = fill(f"{name}/x", (b, d), 1), fill(f"{name}/x_prev", (b, d), 0.5)
    return x, torch.tensor(config["t"]), torch.tensor(config["loss_target"]), torch.tensor(config["loss_prev"]), x_prev


def random_inputs(d, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, x_prev = torch.randn(2, n, d, generator=g, dtype=torch.float64)
    target, prev = 3 * torch.rand(2, n, generator=g, dtype=torch.float64)
    return x, torch.randint(1000, (n,), generator=g), target, prev, x_prev


def randomized(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def activations(model, x, t, target, prev, x_prev):
    """Output and all activations of the published network, which also computes what is never decoded."""
    seen = {}
    last = model.decoder.blocks[-1]
    hooks = [model.decoder.drop.register_forward_hook(lambda m, args, out: seen.update(positioned=out))]
    for i, block in enumerate(model.decoder.blocks):
        keep = lambda m, args, out, i=i: seen.update({f"block{i}": out, "last_input": args[0]})
        hooks.append(block.register_forward_hook(keep))
    with torch.no_grad():
        output = model(x, t, target, loss_prev=prev, x_prev=x_prev)
        for hook in hooks:
            hook.remove()
        seen["tokens_after_ln_in"] = seen.pop("positioned") - model.decoder.pos_emb
        full = last(seen.pop("last_input"))
        name = f"block{len(model.decoder.blocks) - 1}"
        decoded = seen[name].shape[1]
        torch.testing.assert_close(full[:, :decoded], seen[name], rtol=1e-5, atol=1e-5)
        seen[name] = full
        seen["ln_f"] = model.decoder.ln_f(full)
    return output, seen


@pytest.mark.golden("tokenization.json", cases="cases")
def test_tokens_of_the_model_are_the_published_ones(golden):
    config, case = golden.case["config"], golden.case
    keys = ["split_policy", "chunk_size", "num_frequencies", "max_freq_log2", "absolute_loss_conditioning"]
    with torch.device("meta"):
        model = GptModel(config["parameter_sizes"], **{k: config[k] for k in keys}, n_layer=1, n_head=1, n_embd=2)
    assert model.num_weights == case["n_params"]
    assert list(model.tokenizer.lengths) == case["input_splits"]
    assert model.decoder.pos_emb.shape[1] == case["block_size"]
    outputs = [layers[-1].out_features for layers in model.decoder.output_parameter_projections]
    assert outputs == case["output_splits"]


def settings_behind(inputs, outputs, embedding):
    """Layer sizes, split policy, chunk size and number of scalars that give these tokens (one of possibly several)."""
    scalars = (sum(inputs) - 2 * sum(outputs)) // embedding
    for policy in ("layer_by_layer", "chunk_within_layer", "chunk_within_input", "chunk"):
        sizes = outputs if "layer" in policy else [sum(outputs)]
        tokenizer = LayerTokenizer([sizes, sizes, *[[embedding]] * scalars], policy, max(inputs))
        if list(tokenizer.lengths) == inputs:
            return sizes, policy, max(inputs), scalars
    raise AssertionError(f"no split policy gives the tokens {inputs}")


@pytest.mark.golden("state_dict_layouts.json", cases="models")
def test_state_dict_is_the_published_one(golden, build_model):
    from gpt_diffusion.optim import param_groups

    case = golden.case
    shapes = {
        key: [int(n) for n in shape[:-1].split(",")] for key, shape in (s.split(" [") for s in case["state_dict"])
    }
    lengths = {
        side: [s[axis] for k, s in shapes.items() if f".{side}_parameter_projections." in k]
        for side, axis in (("input", 1), ("output", 0))
    }
    frequencies, n_embd = shapes["scalar_embedder.frequencies"][0], shapes["decoder.ln_f.weight"][0]
    sizes, policy, chunk, scalars = settings_behind(lengths["input"], lengths["output"], 2 * frequencies + 1)
    with torch.device("meta"):
        model = GptModel(
            sizes,
            split_policy=policy,
            chunk_size=chunk,
            num_frequencies=frequencies,
            absolute_loss_conditioning=scalars == 4,
            n_layer=sum(key.endswith("ln1.weight") for key in shapes),
            n_head=1,
            n_embd=n_embd,
        )
    assert [f"{k} {list(v.shape)}" for k, v in model.state_dict().items()] == case["state_dict"]
    assert len(model.state_dict()) == case["n_tensors"]
    assert model.decoder.pos_emb.shape[1] == case["n_tokens"]
    assert sum(p.numel() for p in model.parameters()) == case["n_parameters"]
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, case["optimizer_groups"][0]["weight_decay"])
    for group, expected in zip(groups, case["optimizer_groups"], strict=True):
        names = [name_of[id(p)] for p in group["params"]]
        assert group["weight_decay"] == expected["weight_decay"]
        assert len(names) == expected["n_tensors"]
        assert names[: len(expected["first"])] == expected["first"]
        assert names[-len(expected["last"]) :] == expected["last"]


@pytest.mark.golden("transformer_forward.json", cases="cases")
def test_forward_is_the_published_one(golden, filled_model):
    config, arrays = golden.case["config"], golden.tensors()
    model = filled_model(config)
    assert sum(p.numel() for p in model.parameters()) == golden.case["n_model_parameters"]
    inputs = golden_inputs(config)
    output, seen = activations(model, *inputs)
    seen |= {"output": output}
    stored = {k.removeprefix(config["name"] + "/"): v for k, v in arrays.items() if k.startswith(config["name"] + "/")}
    assert set(golden.case["intermediate"]) <= set(seen)
    for key, expected in stored.items():
        assert_close(seen[key], expected, "gpt-diffusion/forward", key)
    for key, stats in golden.case["intermediate"].items():
        assert_stats(seen[key], stats, "gpt-diffusion/forward", key)
    assert_stats(output, golden.case["output"], "gpt-diffusion/forward", "output")
    assert_stats(output - inputs[-1], golden.case["output_minus_x_prev"], "gpt-diffusion/forward", "output - x_prev")


@pytest.mark.slow
@pytest.mark.golden("transformer_forward_real_*.json")
def test_forward_of_the_released_sizes_is_the_published_one(golden, filled_model):
    config = golden.case["config"]
    model = filled_model(config)
    assert sum(p.numel() for p in model.parameters()) == golden.case["n_model_parameters"]
    inputs = golden_inputs(config)
    output, seen = activations(model, *inputs)
    assert_stats(output, golden.case["output"], "gpt-diffusion/forward", "output")
    assert_stats(output - inputs[-1], golden.case["output_minus_x_prev"], "gpt-diffusion/forward", "output - x_prev")
    for key, stats in golden.case["intermediate"].items():
        assert_stats(seen[key], stats, "gpt-diffusion/forward", key)


def plain_forward(state, sizes, policy, chunk, heads, absolute, x, t, target, prev, x_prev):
    """G written out over its state dict, one token at a time and nothing shared (spec of the published network)."""
    w = state.__getitem__
    table = w("scalar_embedder.frequencies")

    def embed(s):
        a = s.float()[:, None] * table
        return torch.cat([a.sin(), a.cos(), s.float()[:, None]], 1).to(x.dtype)

    scalars = [t, target - prev, target, prev] if absolute else [t, target - prev]
    z = torch.cat([x, x_prev, *map(embed, scalars)], 1)
    lengths = LayerTokenizer((sizes, sizes, *[[2 * len(table) + 1]] * len(scalars)), policy, chunk).lengths
    outputs = LayerTokenizer((sizes,), policy, chunk).lengths

    def layers(kind, k):
        key = f"decoder.{kind}_parameter_projections.{k}."
        return [v for name, v in state.items() if name.startswith(key)]

    def norm(h, key):
        return F.layer_norm(h, h.shape[-1:], w(key + ".weight"), w(key + ".bias"))

    def linear(h, key):
        return h @ w(key + ".weight").T + w(key + ".bias")

    tokens = []
    for k, value in enumerate(z.split(lengths, 1)):
        first, *others = layers("input", k)
        e = value @ first.T
        for other in others:
            e = F.gelu(e) @ other.T
        tokens.append(e)
    h = norm(torch.stack(tokens, 1), "decoder.ln_in") + w("decoder.pos_emb")
    for i in itertools.count():
        b = f"decoder.blocks.{i}."
        if b + "ln1.weight" not in state:
            break
        a = norm(h, b + "ln1")
        q, k, v = (
            linear(a, f"{b}attn.{n}").unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("query", "key", "value")
        )
        y = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + linear(y.transpose(1, 2).flatten(2), b + "attn.proj")
        h = h + linear(F.gelu(linear(norm(h, b + "ln2"), b + "mlp.0")), b + "mlp.2")
    h = norm(h, "decoder.ln_f")
    out = []
    for k in range(len(outputs)):
        o = h[:, k]
        *others, last = layers("output", k)
        for other in others:
            o = F.gelu(o @ other.T)
        out.append(o @ last.T)
    return torch.cat(out, 1) + x_prev


@pytest.mark.parametrize(("policy", "chunk"), POLICIES)
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_grouped_tokens_and_conditioned_path_equal_the_plain_network(policy, chunk, absolute, depth):
    config = SMALL | {"split_policy": policy, "chunk_size": chunk, "absolute_loss_conditioning": absolute}
    config |= {"encoder_depth": depth, "decoder_depth": depth}
    model = randomized(GptModel(**config)).double()
    sizes = config["parameter_sizes"]
    x, t, target, prev, x_prev = random_inputs(sum(sizes))
    with torch.no_grad():
        expected = plain_forward(
            model.state_dict(), sizes, policy, chunk, config["n_head"], absolute, x, t, target, prev, x_prev
        )
        bound = model.condition(target, prev, x_prev)
        for actual in (model(x, t, target, loss_prev=prev, x_prev=x_prev), bound(x, t)):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        later = (t + 17) % 1000
        torch.testing.assert_close(
            bound(2 * x, later), model(2 * x, later, target, loss_prev=prev, x_prev=x_prev), rtol=0, atol=1e-12
        )


def test_gradients_reach_every_parameter_and_equal_those_of_the_plain_network():
    model = randomized(GptModel(**SMALL)).double()
    x, t, target, prev, x_prev = random_inputs(26)
    ours = torch.autograd.grad(
        model(x, t, target, loss_prev=prev, x_prev=x_prev).square().sum(), list(model.parameters())
    )
    state = {k: v.detach().requires_grad_(k.startswith("decoder")) for k, v in model.state_dict().items()}
    out = plain_forward(state, SMALL["parameter_sizes"], "chunk_within_layer", 5, 2, True, x, t, target, prev, x_prev)
    plain = torch.autograd.grad(out.square().sum(), [state[name] for name, _ in model.named_parameters()])
    for (name, _), a, b in zip(model.named_parameters(), ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)
        # a bias of the keys shifts all scores of a query alike, so only its gradient vanishes
        assert b.abs().max() > 1e-8 or name.endswith("key.bias"), name


@pytest.mark.parametrize(("policy", "chunk"), POLICIES)
def test_a_new_model_returns_the_start_exactly(policy, chunk):
    model = GptModel(**SMALL | {"split_policy": policy, "chunk_size": chunk, "decoder_depth": 2})
    x, t, target, prev, x_prev = random_inputs(26)
    out = model(x.float(), t, target, loss_prev=prev, x_prev=x_prev.float())
    torch.testing.assert_close(out, x_prev.float(), rtol=0, atol=0)


def test_initial_weights_follow_the_published_law():
    torch.manual_seed(0)
    model = GptModel([300, 20], split_policy="layer_by_layer", n_layer=1, n_head=2, n_embd=64, encoder_depth=2)
    state = model.state_dict()
    for name, p in model.named_parameters():
        if name.endswith("bias") or name == "decoder.pos_emb" or "output_parameter" in name:
            assert not p.any(), name
        elif ".ln" in name:
            assert (p == 1).all(), name
        elif p.numel() > 3000:
            assert abs(p.std().item() - 0.02) < 0.001 and abs(p.mean().item()) < 0.001, name
    assert "decoder.input_parameter_projections.0.2.weight" in state


def test_metrics_and_steps_may_be_columns():
    model = randomized(GptModel(**SMALL))
    x, t, target, prev, x_prev = random_inputs(26)
    flat = model(x.float(), t, target, loss_prev=prev, x_prev=x_prev.float())
    column = model(x.float(), t[:, None], target[:, None], loss_prev=prev[:, None], x_prev=x_prev.float())
    torch.testing.assert_close(flat, column, rtol=0, atol=0)


def test_difference_of_metrics_is_taken_before_rounding():
    """In float32 the two metrics are equal; their difference of 1e-9 must still be seen, as in the published training."""
    model = randomized(GptModel(**SMALL | {"absolute_loss_conditioning": False, "max_freq_log2": 40}))
    x, t, _, _, x_prev = (v.float() if v.is_floating_point() else v for v in random_inputs(26))
    prev = torch.full((3,), 2.3, dtype=torch.float64)
    a = model(x, t, prev + 1e-9, loss_prev=prev, x_prev=x_prev)
    b = model(x, t, prev, loss_prev=prev, x_prev=x_prev)
    assert (a - b).abs().max() > 1e-4


def test_dropout_acts_in_training_only():
    model = randomized(GptModel(**SMALL, dropout_prob=0.5))
    x, t, target, prev, x_prev = random_inputs(26)
    call = lambda: model(x.float(), t, target, loss_prev=prev, x_prev=x_prev.float())
    assert not torch.equal(call(), call())
    model.eval()
    assert torch.equal(call(), call())


def test_the_whole_model_compiles_into_one_graph_with_equal_results():
    model = randomized(GptModel(**SMALL)).eval()
    x, t, target, prev, x_prev = (v.float() if v.is_floating_point() else v for v in random_inputs(26))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(x, t, target, loss_prev=prev, x_prev=x_prev)
    assert torch.equal(compiled(x, t, target, loss_prev=prev, x_prev=x_prev), expected)


def test_bfloat16_weights_work_on_a_float32_state():
    model = randomized(GptModel(**SMALL)).eval()
    x, t, target, prev, x_prev = (v.float() if v.is_floating_point() else v for v in random_inputs(26))
    exact = model(x, t, target, loss_prev=prev, x_prev=x_prev)
    coarse = model.bfloat16()(x, t, target, loss_prev=prev, x_prev=x_prev)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, exact, rtol=0.05, atol=0.1)


def test_all_faults_of_a_state_dict_are_in_one_error():
    model = GptModel(**SMALL)
    state = model.state_dict()
    state["decoder.head.weight"] = torch.zeros(3)
    del state["decoder.ln_f.bias"]
    state["decoder.pos_emb"] = torch.zeros(1, 2, 16)
    state["scalar_embedder.frequencies"] = state["scalar_embedder.frequencies"].bfloat16()
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    for part in ("decoder.head.weight", "decoder.ln_f.bias", "size mismatch for decoder.pos_emb"):
        assert part in str(error.value)
    assert "frequencies must be float32 and never be cast, got torch.bfloat16" in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_head": 3}, r"n_embd \(16\) must be a multiple of n_head \(3\)"),
        ({"n_layer": 0}, "n_layer=0.*at least 1"),
        ({"parameter_names": ["a"]}, "1 parameter names for 4 parameter sizes"),
        ({"split_policy": "rows"}, "split policy 'rows' is unknown; use one of chunk, layer_by_layer"),
        ({"chunk_size": None}, "chunk size must be at least 1.*None"),
        ({"parameter_sizes": [3, 0]}, r"layer sizes must be positive.*\(3, 0\)"),
        ({"num_frequencies": 1}, "num_frequencies must be at least 2, got 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        GptModel(**SMALL | change)


def test_inputs_of_another_layout_are_named():
    model = GptModel(**SMALL)
    x, t, target, prev, x_prev = random_inputs(26)
    with pytest.raises(ValueError, match=r"x_prev: expected \(n, 26\), got \(3, 20\)"):
        model(x, t, target, loss_prev=prev, x_prev=x_prev[:, :20])
    with pytest.raises(ValueError, match=r"x: expected the shape of x_prev \(3, 26\), got \(2, 26\)"):
        model(x[:2], t[:2], target, loss_prev=prev, x_prev=x_prev)
