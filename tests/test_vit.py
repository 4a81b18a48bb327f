"""The model as a whole: parameters, equal paths, tokens, regularisers, errors. The parts have files of their own."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_vit import (
    EVERYTHING,
    GRID,
    KEY,
    B,
    D,
    L,
    N,
    assert_close,
    count,
    flat,
    forward,
    images,
    random_params,
    tiny,
    training_forward,
)
from vit_flax.models import SIZES, ViT, make_model
from vit_flax.models.attend import IMPLEMENTATIONS
from vit_flax.models.block import MLPS
from vit_flax.models.encoder import REMAT
from vit_flax.models.heads import POOLS
from vit_flax.models.layers import ACTIVATIONS
from vit_flax.models.patches import patchify
from vit_flax.models.posemb import FIXED_TABLES, ROPES
from vit_flax.models.vit import RAMPS


@pytest.fixture(scope="module")
def plain():
    """The plain model, its parameters and its compiled forward pass."""
    model = tiny()
    return model, random_params(model), forward(model)


# Parameters and shapes, without computing anything.


def abstract_forward(model: ViT, size_px: int, batch: int = 2):
    pixels = jax.ShapeDtypeStruct((batch, size_px, size_px, 3), jnp.float32)
    outputs, variables = jax.eval_shape(partial(model.init_with_output, train=False), jax.random.key(0), pixels)
    return outputs, variables["params"]


@pytest.mark.parametrize(
    ("variant", "fields", "count"),
    [
        ("Ti/16", {}, 5_717_416),
        ("S/16", {}, 22_050_664),
        ("B/16", {}, 86_567_656),
        ("B/32", {}, 88_224_232),
        ("L/16", {}, 304_326_632),
        ("H/14", {}, 632_045_800),
        ("S/16", {"pool": "gap"}, 22_049_896),
        ("B/16", {"pool": "gap"}, 86_566_120),
        ("S/16", {"class_token_position": False}, 22_050_664 - 384),
        ("S/16", {"scan": False}, 22_050_664),
    ],
)
def test_parameter_count_is_exact(variant, fields, count):
    _, params = abstract_forward(ViT.from_variant(variant, num_classes=1000, **fields), 224)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("size", SIZES)
def test_every_size_runs_and_has_the_parameters_of_its_numbers(size):
    d, depth, f, _ = SIZES[size]
    model = ViT.from_variant(f"{size}/14", num_classes=1000)
    (logits, out), params = abstract_forward(model, 224)
    assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32)
    assert out["encoded"].shape == (2, 257, d)
    assert out["blocks"]["residual"].shape == (depth, 2, 257, d)
    block = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
    rest = (14 * 14 * 3 + 1) * d + (1 + 257) * d + 2 * d + (d + 1) * 1000
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == depth * block + rest


def test_parameter_names_of_s16_are_public():
    """Checkpoints, decay masks and converters depend on these names: a change here is a change of the format."""
    _, params = abstract_forward(ViT.from_variant("S/16", num_classes=1000), 224)
    assert {name: leaf.shape for name, leaf in flat(params).items()} == {
        "blocks/attention/key/bias": (12, 6, 64),
        "blocks/attention/key/kernel": (12, 384, 6, 64),
        "blocks/attention/out/bias": (12, 384),
        "blocks/attention/out/kernel": (12, 6, 64, 384),
        "blocks/attention/query/bias": (12, 6, 64),
        "blocks/attention/query/kernel": (12, 384, 6, 64),
        "blocks/attention/value/bias": (12, 6, 64),
        "blocks/attention/value/kernel": (12, 384, 6, 64),
        "blocks/mlp/fc1/bias": (12, 1536),
        "blocks/mlp/fc1/kernel": (12, 384, 1536),
        "blocks/mlp/fc2/bias": (12, 384),
        "blocks/mlp/fc2/kernel": (12, 1536, 384),
        "blocks/norm1/bias": (12, 384),
        "blocks/norm1/scale": (12, 384),
        "blocks/norm2/bias": (12, 384),
        "blocks/norm2/scale": (12, 384),
        "cls_token/position": (1, 1, 384),
        "cls_token/token": (1, 1, 384),
        "head/bias": (1000,),
        "head/kernel": (384, 1000),
        "norm/bias": (384,),
        "norm/scale": (384,),
        "patch_embed/bias": (384,),
        "patch_embed/kernel": (768, 384),
        "posemb/table": (1, 196, 384),
    }


def test_parameter_names_of_the_optional_parts_are_public():
    params = flat(random_params(tiny(**EVERYTHING, scan=False)))
    optional = {name: leaf.shape for name, leaf in params.items() if not name.startswith("block_1")}
    plain = flat(random_params(tiny(scan=False)))
    assert {name: shape for name, shape in optional.items() if name not in plain} == {
        "block_0/attention/key_norm/bias": (8,),
        "block_0/attention/key_norm/scale": (8,),
        "block_0/attention/query_norm/bias": (8,),
        "block_0/attention/query_norm/scale": (8,),
        "block_0/layer_scale1/scale": (16,),
        "block_0/layer_scale2/scale": (16,),
        "block_0/mlp/gate/bias": (24,),
        "block_0/mlp/gate/kernel": (16, 24),
        "block_0/mlp/norm/bias": (24,),
        "block_0/mlp/norm/scale": (24,),
        "dist_token/position": (1, 1, 16),
        "dist_token/token": (1, 1, 16),
        "pool/attention/key/bias": (2, 8),
        "pool/attention/key/kernel": (16, 2, 8),
        "pool/attention/out/bias": (16,),
        "pool/attention/out/kernel": (2, 8, 16),
        "pool/attention/query/bias": (2, 8),
        "pool/attention/query/kernel": (16, 2, 8),
        "pool/attention/value/bias": (2, 8),
        "pool/attention/value/kernel": (16, 2, 8),
        "pool/mlp/fc1/bias": (24,),
        "pool/mlp/fc1/kernel": (16, 24),
        "pool/mlp/fc2/bias": (16,),
        "pool/mlp/fc2/kernel": (24, 16),
        "pool/mlp/gate/bias": (24,),
        "pool/mlp/gate/kernel": (16, 24),
        "pool/norm/bias": (16,),
        "pool/norm/scale": (16,),
        "pool/probe": (1, 1, 16),
        "pre_logits/bias": (8,),
        "pre_logits/kernel": (16, 8),
        "pre_norm/bias": (16,),
        "pre_norm/scale": (16,),
        "registers/tokens": (1, 2, 16),
    }
    assert sorted(set(plain) - set(params)) == [
        "block_0/attention/key/bias",
        "block_1/attention/key/bias",
        "patch_embed/bias",
    ]


# Every advertised choice. Lists come from the model's own tables, so that a new choice is covered when it is added.

CHOICES = {
    "pool": [*POOLS],
    "posemb": ["learned", "none", *FIXED_TABLES],
    "rope": [None, *ROPES],
    "mlp": [*MLPS],
    "mlp_norm": [False, True],
    "activation": [*ACTIVATIONS],
    "registers": [0, 2],
    "class_token": [None, True, False],
    "class_token_position": [True, False],
    "dist_token": [False, True],
    "pre_norm": [False, True],
    "norm_after_pool": [False, True],
    "representation_size": [None, 8],
    "qk_norm": [False, True],
    "qkv_bias": ["qkv", "qv", ""],
    "patch_bias": [True, False],
    "head_dim": [None, 4],
    "layer_scale": [None, 0.1],
    "drop_path": [0.0, 0.3],
    "drop_path_ramp": [*RAMPS],
    "dropout": [0.0, 0.2],
    "attention_dropout": [0.0, 0.2],
    "head_dropout": [0.0, 0.2],
    "head_zero_init": [True, False],
    "num_classes": [5, 5, None],
    "scan": [True, False],
    "remat": [*REMAT],
    "attention_impl": [name for name in IMPLEMENTATIONS if name != "cudnn"],
    "return_attention": [False, True],
    "dtype": ["float32", "bfloat16"],
}


def consistent(fields: dict) -> dict:
    pool = POOLS[fields["pool"]]
    if pool.needs_dist_token:
        fields |= {"dist_token": True}
    if pool.needs_class_token and fields["class_token"] is False:
        fields |= {"class_token": None}
    return fields


def covering_rows() -> list[dict]:
    """A few rows in which every choice of every field occurs."""
    longest = max(map(len, CHOICES.values()))
    # The offset keeps two fields with equally many choices from always moving together.
    return [consistent({f: c[(i + k) % len(c)] for k, (f, c) in enumerate(CHOICES.items())}) for i in range(longest)]


def pairwise_rows() -> list[dict]:
    """Rows in which every two choices of two fields meet (as far as they may), found greedily."""
    pairs = {(f, a, g, b) for f, g in itertools.combinations(CHOICES, 2) for a in CHOICES[f] for b in CHOICES[g]}
    rng, rows = np.random.default_rng(0), []

    def met(row):
        return {(f, row[f], g, row[g]) for f, g in itertools.combinations(CHOICES, 2)}

    while pairs and len(rows) < 24:
        candidates = [consistent({f: c[rng.integers(len(c))] for f, c in CHOICES.items()}) for _ in range(40)]
        rows.append(max(candidates, key=lambda row: len(pairs & met(row))))
        pairs -= met(rows[-1])
    return rows


def init_and_grad(model: ViT):
    def run(key, x):
        params = model.init(key, x, train=False)["params"]

        def loss(params):
            logits, _ = model.apply({"params": params}, x, train=True, rngs={"dropout": key})
            return jnp.sum(jnp.sin(logits + 1.0)), logits

        gradients, logits = jax.grad(loss, has_aux=True)(params)
        return params, logits, gradients

    return run


@pytest.mark.parametrize("row", covering_rows(), ids=lambda row: f"{row['pool']}-{row['posemb']}-{row['rope']}")
def test_every_choice_initialises_and_has_finite_gradients(row):
    params, logits, gradients = jax.jit(init_and_grad(tiny(**row, depth=1)))(KEY(0), images())
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    for name, leaf in flat(gradients).items():
        assert np.isfinite(leaf).all(), name
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


def test_every_pair_of_choices_can_be_combined():
    rows = pairwise_rows()
    used = {(f, repr(row[f])) for row in rows for f in CHOICES}
    assert used == {(f, repr(choice)) for f, choices in CHOICES.items() for choice in choices}
    for row in rows:
        model = tiny(**row, depth=1)
        rngs = {"params": KEY(0), "dropout": KEY(1)}
        (logits, _), variables = jax.eval_shape(partial(model.init_with_output, train=True), rngs, images())
        features = (2 * D if row["pool"] == "tok_gap" else D) if row["representation_size"] is None else 8
        tokens = {"none": (N + model.num_prefix_tokens,)}.get(row["pool"], ())
        if row["pool"] == "tok_dist" and row["num_classes"] is None:
            tokens = (2,)
        assert logits.shape == (B, *tokens, row["num_classes"] or features), row
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


# Two ways to the same numbers.


def test_images_equal_the_sequences_cut_from_them(plain):
    _, params, apply = plain
    x = images()
    patches = np.stack(
        [
            [x[b, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].ravel() for r in range(GRID[0]) for c in range(GRID[1])]
            for b in range(B)
        ]
    )
    assert_close(patchify(x, 4)[0], patches, tol=0)
    assert_close(apply(params, patches), apply(params, x))


@pytest.mark.parametrize("fields", [{"posemb": "sincos2d"}, {"posemb": "none", "rope": "dinov3"}])
def test_a_sequence_with_its_grid_equals_the_rectangle(fields):
    model = tiny(**fields, depth=1)
    params, patches = random_params(model), patchify(images(), 4)[0]
    run = jax.jit(lambda x, grid: model.apply({"params": params}, x, train=False, grid=grid)[0], static_argnums=1)
    expected = run(images(), None)
    assert_close(run(patches, GRID), expected)
    assert np.abs(run(patches, (3, 2)) - expected).max() > 1e-2


@pytest.mark.parametrize("fields", [{}, {"pool": "gap"}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("examples", [1, 2])
def test_gradients_of_single_examples_side_by_side(fields, examples):
    """`vmap` of a gradient over batches of one or two: products so small that XLA's CPU backend takes other ways."""
    model = tiny(**fields)
    params = random_params(model)
    x = jnp.stack([images(seed)[:examples] for seed in range(3)])
    gradients = jax.grad(lambda params, x: jnp.sum(jnp.sin(model.apply({"params": params}, x, train=False)[0])))
    together = jax.jit(jax.vmap(gradients, in_axes=(None, 0)))(params, x)
    alone = jax.tree.map(lambda *g: jnp.stack(g), *map(partial(jax.jit(gradients), params), x))
    assert_close(together, alone, tol=1e-4 if "dtype" not in fields else 0.1)


def test_bfloat16_is_close_to_float32(plain):
    _, params, apply = plain
    expected, full = apply(params, images())
    logits, out = forward(tiny(dtype="bfloat16"))(params, images())
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(full)} == {jnp.dtype("float32")}
    difference = np.abs(logits - expected).max() / np.std(expected)
    assert 1e-4 < difference < 0.05
    # The head itself is exact: its kernel and its result are not rounded.
    head = params["head"]
    exact = out["pre_logits"].astype(jnp.float32) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(logits, exact, atol=1e-5)


def test_return_attention_shows_the_weights_and_changes_nothing(plain):
    _, params, apply = plain
    logits, out = forward(tiny(return_attention=True))(params, images())
    weights = out["blocks"].pop("attention_weights")
    expected_logits, expected_out = apply(params, images())
    assert_close((logits, out), (expected_logits, expected_out))
    assert weights.shape == (L, B, 2, N + 1, N + 1)
    assert (np.asarray(weights) >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


# Tokens.

SHUFFLE = np.array([4, 2, 0, 5, 1, 3])


@pytest.mark.parametrize(
    ("fields", "invariant"),
    [
        (dict(pool="gap", posemb="none", registers=2), True),
        (dict(pool="tok", posemb="none"), True),
        (dict(pool="gap", posemb="learned"), False),
        (dict(pool="gap", posemb="none", rope="dinov3"), False),
    ],
)
def test_the_order_of_patches_matters_only_through_positions(fields, invariant):
    model = tiny(**fields, depth=1)
    patches = patchify(images(), 4)[0]
    run = forward(model, grid=GRID)
    params = random_params(model)
    difference = np.abs(run(params, patches)[0] - run(params, patches[:, SHUFFLE])[0]).max()
    assert (difference < 1e-5) == invariant
    assert invariant or difference > 1e-2


def test_tokens_come_in_the_order_class_distillation_registers_patches():
    model = tiny(class_token=True, dist_token=True, registers=2, posemb="none", pool="gap", depth=1)
    params = random_params(model)
    _, out = forward(model)(params, images())
    names = [("cls_token", "token"), ("dist_token", "token"), ("registers", "tokens")]
    expected = np.concatenate([params[module][name][0] for module, name in names])
    assert model.num_prefix_tokens == 4
    for tokens in out["tokens"]:
        np.testing.assert_array_equal(tokens[:4], expected)
    assert out["tokens"].shape == (B, 4 + N, D)


def test_learned_positions_are_added_to_patches_and_to_the_class_token(plain):
    _, params, apply = plain
    _, out = apply(params, images())
    token, position = params["cls_token"]["token"], params["cls_token"]["position"]
    embed = params["patch_embed"]
    patches = patchify(images(), 4)[0] @ embed["kernel"] + embed["bias"][None, None] + params["posemb"]["table"]
    np.testing.assert_allclose(out["tokens"][:, 1:], patches, atol=1e-5)
    np.testing.assert_allclose(out["tokens"][:, :1], np.broadcast_to(token + position, (B, 1, D)), atol=1e-6)


def test_class_token_without_position_is_the_token_itself():
    model = tiny(class_token_position=False, depth=1)
    params = random_params(model)
    assert set(params["cls_token"]) == {"token"}
    assert set(random_params(tiny(posemb="sincos2d"))["cls_token"]) == {"token"}
    np.testing.assert_array_equal(
        forward(model)(params, images())[1]["tokens"][0, 0], params["cls_token"]["token"][0, 0]
    )


def test_blocks_add_what_they_say(plain):
    """residual = input + attention + mlp, block by block, and the last one is what the final norm sees."""
    _, params, apply = plain
    logits, out = apply(params, images())
    params, out = jax.tree.map(np.asarray, (params, out))
    x, blocks = out["tokens"], out["blocks"]
    for i in range(L):
        x = x + blocks["attention"][i] + blocks["mlp"][i]
        np.testing.assert_allclose(blocks["residual"][i], x, atol=1e-5)
    encoded = layer_norm(x, params["norm"], 1e-6)
    np.testing.assert_allclose(out["encoded"], encoded, atol=1e-4)
    np.testing.assert_allclose(logits, encoded[:, 0] @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-4)


def layer_norm(x, params, eps):
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_norm_eps_and_norm_after_pool():
    before, after = (tiny(pool="gap", norm_after_pool=flag, norm_eps=0.5, depth=1) for flag in (False, True))
    params = random_params(before)
    norm = partial(layer_norm, params=params["norm"], eps=0.5)
    out = forward(before)(params, images())[1]
    residual = np.asarray(out["blocks"]["residual"][-1])
    np.testing.assert_allclose(out["features"], norm(residual).mean(1), atol=1e-5)
    out = forward(after)(params, images())[1]
    np.testing.assert_allclose(out["encoded"], residual, atol=1e-6)
    np.testing.assert_allclose(out["features"], norm(residual.mean(1)), atol=1e-5)


# Regularisers.


@pytest.mark.parametrize("scan", [True, False])
def test_drop_path_ramp_reaches_every_block(scan):
    """Of three blocks the first is always kept, the second doubled or dropped, the third nearly always dropped."""
    model = tiny(depth=3, scan=scan)
    params, x = random_params(model), jnp.repeat(images(), 6, axis=0)
    _, kept = forward(model)(params, x)
    _, out = training_forward(model)(params, x, 0, drop_path=jnp.float32(0.999999))
    kept, out = (jax.tree.map(np.asarray, tree["blocks"]) for tree in (kept, out))
    np.testing.assert_allclose(out["residual"][0], kept["residual"][0], rtol=1e-5, atol=1e-5)
    for branch in ("attention", "mlp"):
        assert not out[branch][2].any()
    dropped = ~out["attention"][1].any(axis=(1, 2))
    assert 0 < dropped.sum() < len(dropped)
    np.testing.assert_allclose(out["attention"][1][~dropped], 2 * kept["attention"][1][~dropped], rtol=1e-4, atol=1e-4)


def test_constant_ramp_gives_every_block_the_same_rate():
    model = tiny(depth=3, drop_path=0.999999, drop_path_ramp="constant")
    _, out = training_forward(model)(random_params(model), images(), 0)
    assert not any(out["blocks"][branch].any() for branch in ("attention", "mlp"))


def test_drop_path_of_zero_is_off():
    """A rate of 0 needs no random stream, and a traced rate of 0 drops nothing."""
    model = tiny()
    params, x = random_params(model), images()
    expected = forward(model)(params, x)
    off = jax.jit(lambda: tiny(drop_path=0.0).apply({"params": params}, x, train=True))
    assert_close(off(), expected)
    assert_close(training_forward(model)(params, x, 0, drop_path=jnp.float32(0.0)), expected)
    assert_close(forward(tiny(drop_path=0.9))(params, x), expected)


def test_traced_drop_path_rates_can_be_vmapped():
    model = tiny(depth=1, drop_path_ramp="constant")
    params, x = random_params(model), images()
    rates = jnp.array([0.0, 0.4, 0.999999])
    run = training_forward(model)
    together, _ = jax.vmap(lambda rate: run(params, x, 3, drop_path=rate))(rates)
    for logits, rate in zip(together, rates):
        np.testing.assert_allclose(logits, run(params, x, 3, drop_path=rate)[0], atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "draws"),
    [
        ({}, 0),
        ({"dropout": 0.1}, 4),  # embedding; in a block the attention branch, the hidden units, the MLP branch
        ({"attention_dropout": 0.1}, 1),
        ({"head_dropout": 0.1}, 1),
        ({"drop_path": 0.1}, 2),  # both branches
    ],
)
def test_random_numbers_are_drawn_where_a_rate_says_so_and_in_training_only(fields, draws):
    model = tiny(**fields, pool="gap")
    params = random_params(model)
    assert count(jax.make_jaxpr(training_forward(model))(params, images(), 0), "random_bits") == draws
    assert count(jax.make_jaxpr(forward(model))(params, images()), "random_bits") == 0


def test_dropout_acts_on_embedding_attention_branch_and_mlp():
    """Zeros appear after the embedding and in both branches, at the rate, and different ones in every block."""
    model = tiny(dropout=0.25, depth=2)
    _, out = training_forward(model)(random_params(model), images(), 0)
    first, second = np.asarray(out["blocks"]["attention"]) == 0
    for zeros in (np.asarray(out["tokens"]) == 0, first, second, np.asarray(out["blocks"]["mlp"]) == 0):
        assert 0.15 < zeros.mean() < 0.35
    assert (first != second).any()


# Initial values, and the head.


def test_initial_values():
    model = tiny(layer_scale=1e-4, registers=1, head_bias_init=-3.0, width=64, num_heads=4, mlp_dim=128)
    variables = jax.jit(partial(model.init, train=False))(KEY(0), images())
    params = jax.tree.map(np.asarray, variables["params"])
    assert (params["head"]["kernel"] == 0).all()
    assert (params["head"]["bias"] == -3).all()
    assert (params["cls_token"]["token"] == 0).all()
    assert (params["blocks"]["layer_scale1"]["scale"] == np.float32(1e-4)).all()
    blocks = params["blocks"]
    assert np.abs(blocks["attention"]["query"]["kernel"][0] - blocks["attention"]["query"]["kernel"][1]).max() > 0.1
    for name, kernel, fans in [
        ("query", blocks["attention"]["query"]["kernel"], 64 + 64),
        ("out", blocks["attention"]["out"]["kernel"], 64 + 64),
        ("fc1", blocks["mlp"]["fc1"]["kernel"], 64 + 128),
    ]:
        limit = math.sqrt(6 / fans)
        assert 0.97 * limit < np.abs(kernel).max() <= limit, name
        assert abs(kernel.std() * math.sqrt(3) / limit - 1) < 0.05, name
    assert abs(params["patch_embed"]["kernel"].std() * math.sqrt(48) - 1) < 0.1
    for value in (params["posemb"]["table"], params["cls_token"]["position"]):
        assert 0.01 < value.std() < 0.03


def test_zero_head_answers_with_its_bias(plain):
    _, params, apply = plain
    head = {"kernel": jnp.zeros((D, 5)), "bias": jnp.full((5,), -2.5)}
    np.testing.assert_array_equal(apply(params | {"head": head}, images())[0], np.full((B, 5), -2.5, np.float32))


def test_head_without_zero_init_is_a_narrow_normal():
    model = tiny(head_zero_init=False, depth=1, num_classes=500)
    kernel = jax.jit(lambda key: model.init(key, images(), train=False)["params"]["head"]["kernel"])(KEY(0))
    assert 0.015 < kernel.std() < 0.025


def test_qk_norm_makes_the_scale_of_queries_irrelevant():
    def change(model):
        params = random_params(model)
        loud = jax.tree_util.tree_map_with_path(lambda path, p: p * 9 if "query/" in name_of(path) else p, params)
        run = forward(model)
        return np.abs(run(params, images())[0] - run(loud, images())[0]).max()

    def name_of(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    assert change(tiny(qk_norm=True, norm_eps=1e-12, depth=1)) < 1e-5
    assert change(tiny(depth=1)) > 1e-2


# Errors.


def test_a_sequence_of_unknown_grid_is_refused_where_positions_need_it():
    patches = jnp.zeros((1, 6, 48))
    for fields in ({"posemb": "sincos2d"}, {"posemb": "none", "rope": "eva"}):
        with pytest.raises(ValueError, match="no square"):
            jax.eval_shape(partial(tiny(**fields).init, train=False), jax.random.key(0), patches)
    jax.eval_shape(partial(tiny().init, train=False), jax.random.key(0), patches)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": "mean"}, "pool='mean' is unknown.*'gap'"),
        ({"posemb": "sincos"}, "posemb='sincos' is unknown.*'sincos2d'"),
        ({"rope": "x"}, "rope='x' is unknown.*'dinov3'"),
        ({"mlp": "glu"}, "mlp='glu' is unknown.*'swiglu'"),
        ({"activation": "relu"}, "activation='relu' is unknown.*'gelu_tanh'"),
        ({"remat": "all"}, "remat='all' is unknown.*'full'"),
        ({"drop_path_ramp": "cosine"}, "drop_path_ramp='cosine' is unknown.*'linear'"),
        ({"attention_impl": "flash"}, "attention_impl='flash' is unknown.*'cudnn'"),
        ({"qkv_bias": "vq"}, "qkv_bias='vq' is unknown.*'qv'"),
        ({"num_heads": 3}, "num_heads=3 must divide model.width=16"),
        ({"num_heads": 0}, "num_heads must be 1 or more"),
        ({"patch_size": 0}, "patch_size is one side or .* of 1 or more, got 0"),
        ({"registers": -1}, "registers must be 0 or more"),
        ({"rope": "eva", "head_dim": 6}, "multiple of 4, found 6"),
        ({"dropout": 1.0}, "dropout is a probability below 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path is a probability"),
        ({"pool": "tok_dist"}, "set model.dist_token=True"),
        ({"pool": "tok", "class_token": False}, "cannot have model.class_token=False"),
    ],
)
def test_a_model_that_cannot_be_is_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_an_unknown_field_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match=r"no field 'drop_pth'\. Did you mean 'drop_path'"):
        make_model(variant="S/16", num_classes=5, drop_pth=0.1)
