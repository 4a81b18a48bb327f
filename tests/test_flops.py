"""Counted arithmetic, against the matrix products in the program itself and against published figures."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from vit_flax.models import ViT
from vit_flax.models.block import MLPS
from vit_flax.models.flops import forward_flops
from vit_flax.models.heads import POOLS

TINY = dict(num_classes=5, patch_size=4, width=16, depth=2, mlp_dim=24, num_heads=2)


def products(jaxpr) -> int:
    """Operations of all matrix products in a program: two per element of the result and of the sum."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * terms * equation.outvars[0].aval.size
        for value in jax.tree.leaves([*equation.params.values()]):
            if hasattr(value, "eqns"):
                total += equation.params.get("length", 1) * products(getattr(value, "jaxpr", value))
    return total


def rows():
    parts = {
        "sizes": dict(patch_size=(2, 6), head_dim=4, mlp="swiglu"),
        "tokens": dict(class_token=True, dist_token=True, registers=2),
        "representation": dict(representation_size=9),
    }
    for part, pool in itertools.product(parts, POOLS):
        yield pytest.param({**parts[part], "pool": pool}, id=f"{part}-{pool}")
    for mlp in MLPS:
        yield pytest.param(dict(mlp=mlp, num_classes=None), id=f"headless-{mlp}")
    yield pytest.param(dict(scan=False), id="loop")


@pytest.mark.parametrize("fields", [*rows()])
def test_every_product_of_the_program_is_counted_once(fields):
    channels = 1 if "patch_size" in fields else 3
    dist_token = POOLS[fields.get("pool", "tok")].needs_dist_token
    model = ViT(**{**TINY, "dist_token": dist_token, **fields})
    image = jax.ShapeDtypeStruct((1, 8, 12, channels), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    program = jax.make_jaxpr(partial(model.apply, train=False))(variables, image)
    logits_only = [True] + [False] * (len(program.out_avals) - 1)
    read, _ = jax.interpreters.partial_eval.dce_jaxpr(program.jaxpr, logits_only)
    grid = (4, 2) if "patch_size" in fields else (2, 3)
    assert forward_flops(model, grid, channels=channels) == products(read)


def test_images_have_three_channels_unless_it_is_said():
    model = ViT(**TINY)
    assert forward_flops(model, (2, 3)) == forward_flops(model, (2, 3), channels=3)


@pytest.mark.parametrize(
    ("variant", "pool", "giga_operations"),
    [
        # Products, hence twice; arXiv:2204.07118.
        ("S/16", "tok", 2 * 4.6),
        ("B/16", "tok", 2 * 17.5),
        ("L/16", "tok", 2 * 61.6),
        ("H/14", "tok", 2 * 167.4),
        # Multiplications and additions; arXiv:2106.04560, table 2.
        ("g/14", "map", 533.1),
        ("G/14", "map", 965.3),
    ],
)
def test_published_figures_at_224_pixels(variant, pool, giga_operations):
    side = 224 // int(variant.split("/")[1])
    model = ViT.from_variant(variant, num_classes=1000, pool=pool)
    assert forward_flops(model, (side, side), as_published=True) / 1e9 == pytest.approx(giga_operations, rel=5e-3)


def test_the_last_block_of_a_class_token_is_cheap():
    """Of twelve blocks' products, a B/16 leaves out a twelfth, but for keys and values."""
    model = ViT.from_variant("B/16", num_classes=1000)
    part = forward_flops(model, (14, 14)) / forward_flops(model, (14, 14), as_published=True)
    assert part == pytest.approx(1 - (10 / 12) / 12, abs=2e-3)
