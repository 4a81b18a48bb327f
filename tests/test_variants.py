"""Names of models, and the answers to fields that make none; more of them in test_vit.py, through the model itself."""

import re
from types import SimpleNamespace

import jaxtyping
import pytest

from vit_flax.models import ViT
from vit_flax.models.heads import POOLS
from vit_flax.models.variants import SIZES, check_choices, check_fields, parse

TINY = dict(num_classes=5, patch_size=4, width=24, depth=1, mlp_dim=8, num_heads=2)
PUBLISHED = {  # width, depth, MLP, heads
    "Ti": (192, 12, 4 * 192, 3),  # arXiv:2012.12877, table 1; the MLP is four times as wide
    "S": (384, 12, 4 * 384, 6),
    "B": (768, 12, 3072, 12),  # arXiv:2010.11929, table 1
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
    "So400m": (1152, 27, 4304, 16),  # arXiv:2305.13035
    "g": (1408, 40, 6144, 16),  # arXiv:2106.04560, table 2
    "G": (1664, 48, 8192, 16),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_size_is_the_published_one(size):
    names = ("width", "depth", "mlp_dim", "num_heads", "patch_size")
    assert parse(f"{size}/14") == dict(zip(names, (*PUBLISHED[size], 14), strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_takes_every_kind_of_positions(size):
    fields = parse(f"{size}/7")
    head_dim, rest = divmod(fields["width"], fields["num_heads"])
    assert (rest, fields["width"] % 4, head_dim % 4, fields["patch_size"]) == (0, 0, 0, 7)


@pytest.mark.parametrize(
    "name",
    ["", "B", "B/", "/16", "B16", "B/0", "B/00", "B/-1", "B/1.5", "b/16", "X/16", "ViT-B/16", "B/16/2", "B/16\n"],
)
def test_an_unknown_name_is_refused_with_the_known_sizes(name):
    message = f"Unknown model variant {name!r}: expected <size>/<patch size in pixels>, such as 'B/16', with a size out"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse(name)
    assert str(error.value).split("out of ")[1] == "mu, Ti, S, M, B, L, So400m, H, g, G."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["width", "wdith", "qqq"], "ViT has no field 'wdith'. Did you mean 'width'?"),
        (["qqq", "wdith"], "ViT has no field 'qqq'. Known: width, depth."),
    ],
)
def test_the_first_unknown_field_is_answered_with_the_nearest_or_with_all(given, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        check_fields(given, ["width", "depth"])
    check_fields(["depth", "width"], ["width", "depth"])


def test_a_choice_is_answered_with_the_choices():
    model = SimpleNamespace(rope="x", pool="tok")
    message = "model.rope='x' is unknown: expected one of None, 'eva'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_choices(model, pool=["tok"], rope=[None, "eva"])
    check_choices(model, pool=["gap", "tok"], rope=["x"])
    with pytest.raises(ValueError, match=r"model.rope=\['x'\] is unknown: expected one of 'eva'"):
        check_choices(SimpleNamespace(rope=["x"]), rope={"eva": 1})


NAN = float("nan")
PROBABILITIES = ("drop_path", "dropout", "attention_dropout", "head_dropout")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({name: 0}, f"{name} must be 1 or more, got 0.") for name in ("width", "depth", "mlp_dim", "num_heads")),
        *(({"patch_size": p}, f"{p}.") for p in ((0, 4), (4, -1), (4,), (4, 4, 4), -2)),
        *(
            ({name: p}, f"{name} is a probability below 1, got {p}.")
            for name in PROBABILITIES
            for p in (-0.1, 1.0, 2.0)
        ),
        ({"dropout": float("nan")}, "dropout is a probability below 1, got nan."),
        *(
            ({name: size}, f"{name} must be 1 or more, or None, got {size}.")
            for name in ("num_classes", "head_dim", "representation_size", "scan_unroll")
            for size in (0, -8)
        ),
        *(({"norm_eps": eps}, f"norm_eps must be a positive number, got {eps}.") for eps in (0.0, -1.0, NAN)),
        *(({name: NAN}, f"{name} must be a finite number, got nan.") for name in ("layer_scale", "head_bias_init")),
        *(
            ({name: dtype}, f"model.{name}={dtype!r}: expected one of float32, bfloat16, float16.")
            for name in ("dtype", "param_dtype")
            for dtype in ("float64", "int8", "bf16")
        ),
        ({"patch_size": ["2", 2]}, "('2', 2)."),
        ({"rope": "eva", "num_heads": 4}, "its dimension must be a multiple of 4, found 6."),
    ],
)
def test_sizes_and_rates_that_make_no_model_are_refused(fields, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a user's program
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        ViT(**{**TINY, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_heads": 5, "head_dim": 4},
        {"num_heads": 4},
        {"rope": "eva", "num_heads": 4, "head_dim": 8},
        {"rope": "eva", "num_heads": 6},
        {"patch_size": (1, 3)},
        {"depth": 1, "mlp_dim": 1, "num_heads": 1, "registers": 0},
        *({name: 0.999} for name in PROBABILITIES),
    ],
)
def test_unusual_sizes_that_make_a_model_are_taken(fields):
    ViT(**{**TINY, **fields})


def test_a_patch_size_out_of_json_makes_the_same_model(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a user's program
    model = ViT(**{**TINY, "patch_size": [2, 4]})
    assert model == ViT(**{**TINY, "patch_size": (2, 4)})
    assert isinstance(hash(model), int)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pooling_is_refused_exactly_without_the_tokens_that_it_reads(pool):
    needs_class, needs_dist = POOLS[pool].needs_class_token, POOLS[pool].needs_dist_token
    for class_token, dist_token in [(None, True), (True, True), (False, True), (None, False)]:
        fields = {**TINY, "pool": pool, "class_token": class_token, "dist_token": dist_token}
        if (needs_class and class_token is False) or (needs_dist and not dist_token):
            with pytest.raises(ValueError, match=f"model.pool='{pool}' reads the"):
                ViT(**fields)
        else:
            assert ViT(**fields).has_class_token == (needs_class if class_token is None else class_token)
