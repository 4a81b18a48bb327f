import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.vit_tree import DEPTH, full_params, gradients, quick_jit, stacked_params, to_loop, train, unrolled
from vit_flax.optim import ema_update, eval_params, make_optimizer
from vit_flax.update_rules import RULES

PLAIN = {"schedule": "constant", "lr": 0.1, "weight_decay": 0.0, "total_steps": 10}
# Factoring and rounding of moments are tested on their own; here they would only blur comparisons.
EXACT = {"adafactor": {"min_dim_size_to_factor": 4, "mu_dtype": None}}


def make(**section) -> optax.GradientTransformation:
    return make_optimizer(**PLAIN | EXACT.get(section["name"], {}) | section)


def run(params, steps=2, **section) -> dict:
    return train(make(**section), params, steps)[0]


def assert_trees_close(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    tolerance = {"rtol": 2e-5, "atol": 1e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def assert_same_bits(got, want):
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32), np.asarray(want).view(np.uint32))


def test_clip_norm_bounds_the_update():
    params = stacked_params()
    moved = jax.tree.map(np.subtract, run(params, 1, name="sgd", momentum=None, clip_norm=0.5), params)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.1 * 0.5, rtol=1e-5)


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), jnp.float32(0)], ids=lambda zero: type(zero).__name__)
def test_clip_norm_zero_is_off(zero):
    params = stacked_params()
    free = run(params, 1, name="sgd", momentum=None)
    assert_trees_close(run(params, 1, name="sgd", momentum=None, clip_norm=zero), free, rtol=1e-6)


def test_clip_norm_leaves_a_smaller_gradient_alone():
    params = stacked_params()
    clipped = run(params, 1, name="sgd", momentum=None, clip_norm=1e6)
    assert_trees_close(clipped, run(params, 1, name="sgd", momentum=None), rtol=1e-6)


def test_weight_decay_is_multiplied_by_the_learning_rate_and_skips_what_is_no_kernel():
    params = stacked_params()
    decayed = run(params, 1, name="adamw", weight_decay=0.3)
    plain = run(params, 1, name="adamw")
    lost = jax.tree.map(np.subtract, plain, decayed)
    for path, x in jax.tree_util.tree_leaves_with_path(lost):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = params
        for part in name.split("/"):
            leaf = leaf[part]
        want = 0.1 * 0.3 * leaf if name.endswith("kernel") else 0.0 * leaf
        np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-6, err_msg=name)


def test_decay_mask_chooses_what_decays():
    params = stacked_params()
    section = {"name": "sgd", "weight_decay": 0.3, "decay_mask": ["cls_token/token", "block_1/mlp/.*"]}
    lost = jax.tree.map(np.subtract, run(params, 1, name="sgd"), run(params, 1, **section))
    np.testing.assert_allclose(lost["cls_token"]["token"], 0.03 * params["cls_token"]["token"], rtol=1e-4, atol=1e-6)
    assert not lost["head"]["kernel"].any()
    np.testing.assert_array_equal(lost["blocks"]["mlp"]["fc1"]["kernel"].any((1, 2)), [False, True, False])


def test_decay_multipliers_scale_the_decay_as_in_vit_g():
    params = stacked_params()
    section = {"name": "sgd", "weight_decay": 0.3, "decay_multipliers": [["head/kernel", 3.0], ["block_1/.*", 0.0]]}
    lost = jax.tree.map(np.subtract, run(params, 1, name="sgd"), run(params, 1, **section))
    np.testing.assert_allclose(lost["head"]["kernel"], 0.09 * params["head"]["kernel"], rtol=1e-4, atol=1e-6)
    assert not lost["head"]["bias"].any()
    fc1 = params["blocks"]["mlp"]["fc1"]["kernel"] * np.reshape([0.03, 0.0, 0.03], (DEPTH, 1, 1))
    np.testing.assert_allclose(lost["blocks"]["mlp"]["fc1"]["kernel"], fc1, rtol=1e-4, atol=1e-6)


def test_schedule_and_learning_rate_scale_the_update():
    params = stacked_params()
    section = {"name": "sgd", "momentum": None, "schedule": "linear", "warmup_steps": 2}
    tx = make(**section)
    state, sizes = tx.init(params), []
    update = quick_jit(tx.update)
    for _ in range(4):
        updates, state = update(jax.tree.map(np.ones_like, params), state, params)
        sizes.append(float(updates["head"]["bias"][0]))
    np.testing.assert_allclose(sizes, [0.0, -0.05, -0.1, -0.1 * 7 / 8], rtol=1e-5)


def test_patch_embedding_at_a_fifth_of_the_learning_rate():
    params = stacked_params()
    section = {"name": "sgd", "weight_decay": 0.1, "lr_multipliers": [["patch_embed/.*", 0.2]]}
    slow = jax.tree.map(np.subtract, run(params, 1, **section), params)
    full = jax.tree.map(np.subtract, run(params, 1, name="sgd", weight_decay=0.1), params)
    np.testing.assert_allclose(slow["patch_embed"]["kernel"], 0.2 * full["patch_embed"]["kernel"], rtol=1e-4, atol=1e-6)
    assert_trees_close(slow["blocks"], full["blocks"])


def test_layer_decay_scales_the_update_layer_by_layer():
    params = stacked_params()
    slow = jax.tree.map(np.subtract, run(params, 1, name="sgd", layer_decay=0.5), params)
    full = jax.tree.map(np.subtract, run(params, 1, name="sgd"), params)
    ratio = jax.tree.map(lambda a, b: a / b, slow, full)
    np.testing.assert_allclose(ratio["cls_token"]["token"], 0.5 ** (DEPTH + 1), rtol=1e-3)
    per_layer = ratio["blocks"]["attention"]["query"]["kernel"].mean((1, 2, 3))
    np.testing.assert_allclose(per_layer, [0.5**3, 0.5**2, 0.5], rtol=1e-3)
    np.testing.assert_allclose(ratio["head"]["kernel"], 1.0, rtol=1e-3)


@pytest.mark.parametrize(("name", "own"), [*((name, {}) for name in RULES), ("adafactor", {"clipping_threshold": 0.5})])
def test_stacked_equals_loop(name, own):
    params = stacked_params()
    section = {
        **own,
        "name": name,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "layer_decay": 0.7,
        "lr_multipliers": [["patch_embed/.*", 0.2], ["block_1/mlp/.*", 3.0], ["blocks/norm1/.*", 2.0]],
        "freeze": ["block_0/attention/.*", "cls_token/.*"],
    }
    assert_trees_close(to_loop(run(params, 3, **section)), run(to_loop(params), 3, **section))


@pytest.mark.parametrize("name", RULES)
def test_frozen_parameters_keep_every_bit(name):
    params = stacked_params()
    params["head"]["bias"][0] = -0.0
    frozen = ["head/.*", "block_[01]/.*", "block_2/norm1/.*"]
    got, state = train(make(name=name, weight_decay=0.5, freeze=frozen), params, 3)
    jax.tree.map(assert_same_bits, got["head"], params["head"])
    jax.tree.map(lambda a, b: assert_same_bits(a[:2], b[:2]), got["blocks"], params["blocks"])
    assert_same_bits(got["blocks"]["norm1"]["scale"], params["blocks"]["norm1"]["scale"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), got, params)
    assert moved["patch_embed"]["kernel"]
    assert moved["blocks"]["mlp"]["fc1"]["kernel"]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("head" in n or "norm1" in n for n in names), "a frozen parameter has optimiser state"
    assert any("fc1" in n for n in names) or name == "sgd"


def test_frozen_negative_zeros_stay_negative_without_the_compiler():
    params = {
        "blocks": {"norm1": {"scale": np.full((DEPTH, 2), -0.0, np.float32)}},
        "head": {"kernel": np.float32([-0.0])},
    }
    tx = make(name="sgd", freeze=["head/.*", "block_1/.*"])
    updates = jax.device_get(tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)[0])
    assert_same_bits(params["head"]["kernel"] + updates["head"]["kernel"], params["head"]["kernel"])
    assert_same_bits(
        (params["blocks"]["norm1"]["scale"] + updates["blocks"]["norm1"]["scale"])[1], np.float32([-0.0] * 2)
    )


def test_frozen_gradients_have_no_part_in_the_clipping_norm():
    params = stacked_params()
    tx = make(name="adamw", clip_norm=0.1, freeze=["head/.*", "block_0/.*"])
    update = quick_jit(lambda grads: tx.update(grads, tx.init(params), params)[0])
    grads = jax.tree.map(np.array, gradients(params, 0))
    small_updates = update(grads)
    grads["head"]["bias"][:] = np.nan
    grads["blocks"]["norm1"]["scale"][0] = np.inf
    assert_trees_close(update(grads), small_updates, rtol=0, atol=0)


def test_train_last_blocks_freezes_embeddings_and_earlier_blocks():
    params = stacked_params()
    got = to_loop(run(params, name="adamw", weight_decay=0.1, train_last_blocks=1))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), got, to_loop(params))
    for module in ("patch_embed", "cls_token", "block_0", "block_1"):
        assert not any(jax.tree.leaves(moved[module])), module
    for module in ("block_2", "head"):
        assert all(jax.tree.leaves(moved[module])), module


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_members_with_their_own_numbers_equal_single_runs(name):
    static = {"name": name, "schedule": "constant", "warmup_steps": 2, "freeze": ["block_0/.*"]}

    def member(params, numbers):
        return unrolled(make(**static | numbers), params, 2)[0]

    members = [stacked_params(0), stacked_params(1)]
    numbers = {
        "lr": [0.1, 0.2],
        "weight_decay": [0.3, 0.0],
        "clip_norm": [0.5, 3.0],
        "layer_decay": [0.6, 0.9],
        "b2": [0.9, 0.99],
    }
    stack = jax.tree.map(lambda *x: np.stack(x), *members)
    together = quick_jit(jax.vmap(member))(stack, {k: jnp.array(v) for k, v in numbers.items()})
    first = quick_jit(lambda params: member(params, {k: v[0] for k, v in numbers.items()}))(members[0])
    second = quick_jit(member)(members[1], {k: jnp.float32(v[1]) for k, v in numbers.items()})
    for i, alone in enumerate([first, second]):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_state_structure_depends_on_no_number(name):
    shapes = [
        jax.eval_shape(make(name=name, **numbers).init, stacked_params())
        for numbers in (
            {"weight_decay": 0.0, "clip_norm": 0.0, "lr": 0.0},
            {"weight_decay": 0.1, "clip_norm": 1.0, "lr": 1.0, "warmup_steps": 3, "layer_decay": 0.5},
            {"weight_decay": jnp.float32(0.1), "clip_norm": jnp.float32(1.0), "lr": jnp.float32(1.0)},
        )
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("name", RULES)
def test_bfloat16_parameters_and_the_state_keep_their_dtypes(name):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stacked_params())

    def two(numbers):
        tx = make(name=name, **numbers)
        state = tx.init(params)
        updates, next_state = tx.update(params, state, params)
        assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, next_state)
        return updates

    numbers = {"lr": jnp.float32(0.1), "weight_decay": jnp.float32(0.1), "clip_norm": jnp.float32(1.0)}
    assert {u.dtype for u in jax.tree.leaves(jax.eval_shape(two, numbers))} == {jnp.dtype("bfloat16")}


def test_unknown_names_and_arguments_are_named():
    with pytest.raises(ValueError, match=r"'adamv'.*adamw, sgd"):
        make(name="adamv")
    with pytest.raises(ValueError, match="'sgd' takes no b2; its arguments are momentum, nesterov, mu_dtype"):
        make(name="sgd", b2=0.9)
    with pytest.raises(ValueError, match="schedule='constant', not 'cosine'"):
        make(name="schedule_free", schedule="cosine")
    with pytest.raises(ValueError, match="b1=0 keeps no average"):
        make(name="schedule_free", schedule="constant", b1=0.0).init(stacked_params())
    with pytest.raises(ValueError, match="nesterov=True looks ahead along its momentum"):
        make(name="sgd", nesterov=True, momentum=None).init(stacked_params())
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
        make(name="adamw").update({}, {})


def test_eval_params_are_the_average_of_schedule_free_and_else_the_parameters():
    params = stacked_params()
    assert eval_params(make(name="adamw").init(params), params) is params
    tx = make(name="schedule_free", freeze=["patch_embed/.*"], b1=0.8)
    got, state = train(tx, params, 4)
    average = eval_params(state, got)
    assert average["patch_embed"]["kernel"] is got["patch_embed"]["kernel"]
    assert not np.allclose(average["head"]["bias"], got["head"]["bias"], atol=1e-4)
    # With equal weights x is the mean of the z so far; replayed for one parameter from the definition.
    y = z = params["head"]["bias"]
    zs, nu = [], np.zeros_like(y)
    for step in range(4):
        g = np.cos((3.0 + step) * y)
        nu = 0.999 * nu + 0.001 * g**2
        z = z - 0.1 * g / (np.sqrt(nu / (1 - 0.999 ** (step + 1))) + 1e-8)
        zs.append(z)
        x = np.mean(zs, axis=0)
        y = 0.2 * z + 0.8 * x
    np.testing.assert_allclose(got["head"]["bias"], y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(average["head"]["bias"], x, rtol=1e-4, atol=1e-5)


def test_the_schedule_free_average_of_frozen_layers_does_not_decay():
    params = stacked_params()
    tx = make(name="schedule_free", freeze=["block_0/.*"], weight_decay=0.5)
    got, state = train(tx, params, 4)
    frozen = eval_params(state, got)["blocks"]["mlp"]["fc1"]["kernel"][0]
    np.testing.assert_allclose(frozen, params["blocks"]["mlp"]["fc1"]["kernel"][0], rtol=1e-5)


DOCUMENTED = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "optimisation.md").read_text(), re.S
)


@pytest.mark.parametrize("recipe", DOCUMENTED, ids=lambda recipe: recipe.split('"')[1])
def test_documented_recipes_are_accepted(recipe):
    written: dict = {}
    exec(recipe, written)
    assert {"total_steps", "optim"} < set(written)
    tx = make_optimizer(**written["optim"], total_steps=written["total_steps"])
    state = jax.eval_shape(tx.init, full_params())
    jax.eval_shape(tx.update, full_params(), state, full_params())


def test_documentation_has_recipes():
    assert len(DOCUMENTED) > 8


def test_ema_warms_up_and_then_keeps_its_decay():
    ema, params = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([1.0, 4.0])}
    first = ema_update(ema, params, step=jnp.int32(0), decay=0.9)
    np.testing.assert_allclose(first["w"], [1 - 1 / 10, 4.0], rtol=1e-6)
    late = ema_update(ema, params, step=jnp.int32(1000), decay=jnp.float32(0.9))
    np.testing.assert_allclose(late["w"], [0.1, 4.0], rtol=1e-5)
    cold = ema_update(ema, params, step=0, decay=0.9, warmup=False)
    np.testing.assert_allclose(cold["w"], [0.1, 4.0], rtol=1e-5)


def test_ema_keeps_its_own_precision():
    ema = {"w": jnp.float32(1.0)}
    moved = ema_update(ema, {"w": jnp.bfloat16(2.0)}, step=10**6, decay=0.9999)
    assert moved["w"].dtype == jnp.float32
    np.testing.assert_allclose(moved["w"], 1.0001, rtol=1e-6)
