"""Normalisation: statistics, normalised values and the way back are the published ones."""

import re

import pytest
import torch
from sane.normalization import Normalization, measure
from support.autoencoders import filled_state
from support.golden import assert_close, assert_stats
from zoo_common.layout import ParameterLayout
from zoo_common.tokens import ChannelTokenizer


def zoo_of(zoo):
    """Vectors (models, epochs, d) and their layout."""
    states = [
        [filled_state(zoo["shapes"], f"{zoo['tag']}/m{i}/e{e}/") for e in range(zoo["n_epochs"])]
        for i in range(zoo["n_models"])
    ]
    layout = ParameterLayout.from_state_dict(states[0][0])
    vectors = torch.stack([layout.stack(epochs) for epochs in states])
    return layout, vectors + 0.05 * torch.arange(zoo["n_models"])[:, None, None]


@pytest.mark.golden("normalization.json", cases="zoos")
def test_statistics_and_values_are_the_published_ones(golden):
    zoo = golden.case
    layout, vectors = zoo_of(zoo)
    for case in zoo["cases"]:
        tokenizer = ChannelTokenizer.from_layout(layout, 16, ignore_bn=case["ignore_bn"])
        what = f"{case['mode']} ignore_bn={case['ignore_bn']}"
        normalization = measure(list(vectors), tokenizer, case["mode"], legacy_double_bn=True)
        document = normalization.to_document()
        stored = case["layers"] or {}
        assert list(normalization.layers) == list(stored), what
        for name, pair in stored.items():
            assert document[name].keys() == pair.keys()
            assert_close(list(document[name].values()), list(pair.values()), "sane/statistics", f"{what} {name}")
        (key,) = (key for key in case if key.startswith("normalized_"))
        model, epoch = (int(number) for number in re.fullmatch(r"normalized_model(\d+)_epoch(\d+)", key).groups())
        vector = vectors[model, epoch]
        values = normalization.normalize(vector)
        state = {**filled_state(zoo["shapes"], ""), **layout.unflatten(values)}  # counters are not normalised
        assert case[key]
        for name, stats in case[key].items():
            assert_stats(state[name], stats, "float32", f"{what} {name}")
        if case["mode"] == "l2_ind":
            with pytest.raises(ValueError, match="l2_ind cannot be undone"):
                normalization.denormalize(values)
        else:
            back = normalization.denormalize(values)
            assert (back - vector).abs().max() <= 2 * case["denormalize_max_abs_error"] + 1e-7
            again = Normalization.from_document(document, tokenizer, legacy_double_bn=True)
            assert torch.equal(again.normalize(vector), values)


def test_a_published_file_may_name_batch_norms_that_the_tokens_leave_out():
    layout = ParameterLayout.from_state_dict({"conv1.weight": torch.ones(2, 3), "batchnorm1.weight": torch.ones(2)})
    document = {"mode": "standardize"} | {name: {"mean": 0.5, "std": 2.0} for name in layout.names}
    tokenizer = ChannelTokenizer.from_layout(layout, 3, ignore_bn=True)
    found = Normalization.from_document(document, tokenizer)
    assert found.normalize(torch.ones(8)).tolist() == [0.25] * 6 + [1.0] * 2
    with pytest.raises(ValueError, match="of another network: it has conv1"):
        Normalization.from_document({"conv1": {"mean": 0, "std": 1}, "mode": "standardize"}, tokenizer)
