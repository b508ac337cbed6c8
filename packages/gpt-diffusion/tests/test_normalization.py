import pytest
from gpt_diffusion.normalization import get_normalizer
from support.golden import assert_close, fill


@pytest.mark.golden("normalizers.json", cases="cases")
def test_normalizers_are_the_published_ones(golden):
    case = golden.case
    normalizer = get_normalizer(case["name"], case["coeff"])
    x = fill(f"{golden.document['tag']}/norm_x", (len(case["x"]),), 0.3)
    assert_close(x, case["x"], "exact", "input")
    assert_close(normalizer.normalize(x), case["normalized"], "exact", "normalized")
    assert_close(normalizer.unnormalize(normalizer.normalize(x)), case["roundtrip"], "exact", "round trip")
    assert_close(normalizer.range(*case["range_of"]), case["range"], "exact", "range")
    assert str(normalizer) == case["message"]


@pytest.mark.parametrize(
    ("name", "coeff", "match"),
    [
        ("imagenet", 1.0, "'imagenet' is unknown; use openai or none"),
        ("openai", None, "needs openai_coeff"),
        ("openai", 0.0, "must be positive, got 0.0"),
        ("openai", float("nan"), "must be positive, got nan"),
    ],
)
def test_bad_settings_are_named(name, coeff, match):
    with pytest.raises(ValueError, match=match):
        get_normalizer(name, coeff)
