import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.vit_tree import DEPTH, full_params, to_loop
from vit_flax.models import ViT
from vit_flax.param_groups import layer_norms, make_groups, parameter_groups


def test_layer_decay_factors_are_those_of_mae():
    factor = make_groups(full_params(), layer_decay=0.5).factor
    for module in ("patch_embed", "posemb", "cls_token"):
        assert set(map(float, jax.tree.leaves(factor[module]))) == {0.5 ** (DEPTH + 1)}
    for leaf in jax.tree.leaves(factor["blocks"]):
        np.testing.assert_array_equal(leaf.ravel(), [0.5**DEPTH, 0.5 ** (DEPTH - 1), 0.5])
    assert set(map(float, jax.tree.leaves([factor["norm"], factor["head"]]))) == {1.0}


def test_only_what_comes_after_the_blocks_is_trained_without_them():
    model = ViT.from_variant(
        "mu/16",
        num_classes=3,
        dist_token=True,
        class_token=True,
        registers=2,
        pre_norm=True,
        representation_size=8,
        layer_scale=0.1,
        qk_norm=True,
        mlp_norm=True,
    )
    modules, behind = {}, {"norm", "pool", "pre_logits", "head", "head_dist"}
    for pool in ("map", "tok_dist"):
        init = partial(model.clone(pool=pool).init, jax.random.key(0), train=False)
        params = jax.eval_shape(init, jnp.zeros((1, 32, 32, 3)))["params"]
        for module, trained in make_groups(params, train_last_blocks=0).trained.items():
            modules[module] = any(t.any() for t in jax.tree.leaves(trained))
        factor = make_groups(params, layer_decay=0.5).factor
        before = {float(f) for m in set(params) - behind - {"blocks"} for f in jax.tree.leaves(factor[m])}
        assert before == {0.5 ** (model.depth + 1)}
    assert {module for module, trained in modules.items() if trained} == behind
    assert {"dist_token", "cls_token", "registers", "pre_norm", "posemb", "patch_embed"} < set(modules)


def test_factors_broadcast_against_their_parameter():
    params = full_params()
    groups = make_groups(params, layer_decay=0.5, freeze=["block_1/.*"])
    for tree in (groups.factor, groups.trained, groups.decay):
        shapes = jax.tree.map(lambda x, p: np.broadcast_shapes(np.shape(x), p.shape) == p.shape, tree, params)
        assert all(jax.tree.leaves(shapes))
        assert {np.ndim(x) for x in jax.tree.leaves(tree["blocks"])} == {2, 3, 4}


def test_two_encoders_count_their_own_layers():
    deep = {"image": full_params(), "text": {**to_loop(full_params()), "head": {"kernel": np.zeros((4, 2))}}}
    del deep["text"]["block_2"]
    factor = make_groups(deep, layer_decay=0.5).factor
    assert factor["image"]["posemb"]["table"] == 0.5**4
    assert factor["text"]["posemb"]["table"] == 0.5**3
    assert factor["text"]["block_1"]["norm1"]["scale"] == 0.5


@pytest.mark.parametrize("layout", [lambda p: p, to_loop], ids=["stacked", "loop"])
@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("blocks/mlp/fc1/kernel", [True, True, True]),
        ("block_[02]/mlp/.*", [True, False, True]),
        (".*fc1/kernel", [True, True, True]),
    ],
)
def test_one_pattern_selects_the_same_layers_in_both_layouts(layout, pattern, selected):
    decay = make_groups(layout(full_params()), decay_mask=[pattern]).decay
    if "blocks" in decay:
        got = decay["blocks"]["mlp"]["fc1"]["kernel"].ravel().astype(bool).tolist()
    else:
        got = [bool(decay[f"block_{i}"]["mlp"]["fc1"]["kernel"]) for i in range(DEPTH)]
    assert got == selected


def test_multipliers_multiply():
    multipliers = [["head/.*", 10.0], [".*/kernel", 0.5]]
    factor = make_groups(full_params(), lr_multipliers=multipliers).factor
    assert float(factor["head"]["kernel"]) == 5.0
    assert float(factor["head"]["bias"]) == 10.0


def test_a_pattern_that_matches_nothing_names_itself_and_its_neighbours():
    with pytest.raises(ValueError, match=r"'patch_embd/\.\*' matches no parameter.*patch_embed/bias"):
        make_groups(full_params(), freeze=["head/.*", "patch_embd/.*"])
    with pytest.raises(ValueError, match=r"'block_3/\.\*' matches no parameter"):
        make_groups(full_params(), lr_multipliers=[["block_3/.*", 0.1]])
    with pytest.raises(ValueError, match=r"'kernel' matches no parameter"):
        make_groups(full_params(), decay_mask=["kernel"])


def test_a_string_in_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"write \['head/\.\*'\]"):
        make_groups(full_params(), freeze="head/.*")


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(
        ValueError, match=r"train_last_blocks=4 must lie between 0 and the number of blocks, which is 3"
    ):
        make_groups(full_params(), train_last_blocks=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(freeze=["head/(.*"]), r"freeze: 'head/\(\.\*' is no regular expression"),
        (dict(lr_multipliers=[["head/.*"]]), r"lr_multipliers: expected pairs .*, found \['head/\.\*'\]"),
        (dict(lr_multipliers=[["head/.*", "2"]]), "lr_multipliers: expected pairs"),
        (dict(decay_multipliers=[["head/.*", -1.0]]), "decay_multipliers: expected pairs .* of 0 or more"),
        (dict(decay_multipliers=[["posemb/.*", 2.0]]), r"'posemb/\.\*' matches decays.*decay_mask says what decays"),
        (dict(freeze=[".*"]), "leave nothing to train"),
    ],
)
def test_patterns_and_factors_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_groups(full_params(), **options)


SECTION = {
    "decay_multipliers": [["head/.*", 2.0]],
    "layer_decay": 0.5,
    "lr_multipliers": [["head/.*", 10.0]],
    "train_last_blocks": 2,
}


@pytest.mark.parametrize("layout", [lambda p: p, to_loop], ids=["stacked", "loop"])
def test_parameter_groups_say_what_happens(layout):
    params = layout(full_params())
    rows = parameter_groups(params, make_groups(params, **SECTION), weight_decay=0.1)
    table = {(r.pattern, r.layers): (r.num_parameters, r.lr_factor, round(r.weight_decay, 6), r.frozen) for r in rows}
    kernels, vectors = "blocks/(attention|mlp)/.*kernel", "blocks/(attention|norm1)/.*(bias|scale)"
    per_layer = 4 * 6 + 6 * 4 + 4 * 6 + 6 * 4
    assert list(table.items()) == [
        (("cls_token/token", ""), (4, (0.0, 0.0), 0.0, True)),
        (("patch_embed/(bias|kernel)", ""), (52, (0.0, 0.0), 0.0, True)),
        (("posemb/table", ""), (20, (0.0, 0.0), 0.0, True)),
        ((vectors, "0"), (6 + 4 + 4, (0.0, 0.0), 0.0, True)),
        ((kernels, "0"), (per_layer, (0.0, 0.0), 0.0, True)),
        ((vectors, "1-2"), (2 * (6 + 4 + 4), (0.25, 0.5), 0.0, False)),
        ((kernels, "1-2"), (2 * per_layer, (0.25, 0.5), 0.1, False)),
        (("head/bias", ""), (5, (10.0, 10.0), 0.0, False)),
        (("head/kernel", ""), (20, (10.0, 10.0), 0.2, False)),
        (("norm/scale", ""), (4, (1.0, 1.0), 0.0, False)),
    ]
    assert sum(r.num_parameters for r in rows) == sum(x.size for x in jax.tree.leaves(full_params()))


def test_parameter_groups_show_patterns_that_match():
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(full_params())
    }
    rows = parameter_groups(full_params(), make_groups(full_params()), weight_decay=0.0)
    assert all(any(re.fullmatch(row.pattern, name) for name in names) for row in rows)
    assert not any(row.weight_decay for row in rows)


def test_layer_norms_are_per_block_and_add_up():
    params = full_params()
    norms = layer_norms(params)
    assert set(norms) == {"patch_embed", "posemb", "cls_token", "block_0", "block_1", "block_2", "norm", "head"}
    squares = sum(float((x.astype(np.float64) ** 2).sum()) for x in jax.tree.leaves(params))
    np.testing.assert_allclose(sum(float(n) ** 2 for n in norms.values()), squares, rtol=1e-5)
    loop = layer_norms(to_loop(params))
    assert {k: pytest.approx(float(v), rel=1e-5) for k, v in norms.items()} == {k: float(v) for k, v in loop.items()}
