"""The stack of blocks: scan, loop, rematerialisation and the tokens that are read; all equal, as cheap as promised."""

import collections
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_vit import (
    EVERYTHING,
    TINY,
    B,
    D,
    L,
    N,
    all_equations,
    assert_close,
    count,
    forward,
    images,
    loss_and_gradients,
    random_params,
    tiny,
    training_forward,
)
from vit_flax.models import ViT, attend
from vit_flax.models.encoder import REMAT


@pytest.fixture(scope="module")
def everything():
    """A scanned model with every part, its parameters, and its loss, outputs and gradients."""
    model = tiny(**EVERYTHING)
    params = random_params(model)
    return model, params, jax.jit(loss_and_gradients(model))(params, images())


@pytest.mark.parametrize(
    ("reads", "fields"),
    [
        (1, dict()),
        (1, dict(scan=False)),
        (2, dict(pool="tok_dist", dist_token=True)),
        (1, dict(rope="dinov3", registers=2, posemb="none")),
        (1, dict(qk_norm=True, layer_scale=0.1, mlp="swiglu", mlp_norm=True, norm_after_pool=True, pre_norm=True)),
        (1, dict(return_attention=True)),
        (1, dict(depth=1)),
        (1, dict(depth=1, scan=False)),
        (1, dict(depth=4, scan_unroll=2)),
        (1, dict(remat="none")),
        (1, dict(remat="full")),
    ],
)
@pytest.mark.parametrize("read_out", [False, True])
def test_the_last_block_of_the_tokens_that_are_read_equals_that_of_all(reads, fields, read_out):
    """Features, all of `out` and the gradients are those of a model that reads every token."""
    fields = {"pool": "tok", "class_token": True, "num_classes": None, **fields}
    params = random_params(tiny(**fields))

    def run(pool):
        model = tiny(**{**fields, "pool": pool})

        def loss(params, x):
            features, out = model.apply({"params": params}, x, train=False)
            out = {name: out[name] for name in ("tokens", "blocks", "encoded")}
            first = features.reshape(B, -1, D)[:, :reads]
            every = sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(out)) if read_out else 0.0
            return jnp.sum(jnp.sin(first)) + every, (first, out)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, images())

    assert_close(run(fields["pool"]), run("none"), tol=2e-4)


@pytest.mark.parametrize("impl", ["cpu", "xla"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(scan=False),
        dict(remat="full", scan_unroll=2),
        dict(pool="tok_dist", dist_token=True, posemb="none", rope="dinov3"),
        dict(pool="gap", class_token=True),
        dict(pool="map", registers=1, rope="eva", posemb="none", qk_norm=True),
    ],
)
def test_tokens_added_for_the_attention_change_nothing(fields, impl, monkeypatch):
    """Logits, all of `out` and the gradients are those of the model without them."""
    model = tiny(**fields, attention_impl=impl)
    params = random_params(model)

    def run(padding):
        monkeypatch.setattr(attend, "padding", lambda q, impl: padding)

        def loss(params, x):
            logits, out = model.apply({"params": params}, x, train=False)
            return sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves((logits, out))), (logits, out)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, images())

    padded, plain = run(1), run(0)
    assert jax.tree.map(jnp.shape, padded) == jax.tree.map(jnp.shape, plain)
    assert_close(padded, plain, tol=2e-4)


@pytest.mark.parametrize(
    ("backend", "devices", "version", "asks"),
    [
        ("gpu", 1, (0, 10, 2), True),
        ("gpu", 8, (0, 11, 0), True),
        ("gpu", 8, (0, 10, 2), False),  # it would gather the whole batch on each
        ("cpu", 1, (0, 12, 0), False),
    ],
)
def test_the_order_of_tokens_in_memory_is_asked_for(backend, devices, version, asks, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "__version_info__", version)
    model = tiny(attention_impl="xla")
    jaxpr = jax.make_jaxpr(forward(model))(random_params(model), images())
    constraints = [eqn for eqn in all_equations(jaxpr) if eqn.primitive.name == "layout_constraint"]
    assert [eqn.params["layout"].major_to_minor for eqn in constraints] == [(0, 1, 2)] * asks


@pytest.mark.parametrize("fields", [dict(return_attention=True), dict(attention_dropout=0.1)])
def test_attention_in_the_open_gets_no_added_token(fields, monkeypatch):
    model = tiny(**fields)
    params, rngs = random_params(model), {"dropout": jax.random.key(0)}
    monkeypatch.setattr(attend, "padding", lambda q, impl: pytest.fail("asked for padding"))
    jax.eval_shape(partial(model.apply, train=True, rngs=rngs), {"params": params}, images())


@pytest.mark.parametrize("scan", [True, False])
def test_out_shows_what_was_read_where_numbers_are_drawn(scan):
    model = tiny(dropout=0.3, attention_dropout=0.3, drop_path=0.5, scan=scan)
    _, out = training_forward(model)(random_params(model), images(), 0)
    np.testing.assert_allclose(out["encoded"][:, 0], out["features"], atol=1e-6)
    residual, attention, mlp = (out["blocks"][name] for name in ("residual", "attention", "mlp"))
    np.testing.assert_allclose(residual[1], residual[0] + attention[1] + mlp[1], atol=1e-5)


def stack_blocks(params: dict) -> dict:
    """Parameters of the loop in the layout of the scan."""
    blocks = [params[f"block_{i}"] for i in range(L)]
    rest = {name: tree for name, tree in params.items() if not name.startswith("block_")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: dict) -> dict:
    rest = {name: tree for name, tree in params.items() if name != "blocks"}
    return rest | {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(L)}


def test_scan_equals_loop(everything):
    _, params, ((_, scanned), scanned_gradients) = everything
    model = tiny(**EVERYTHING, scan=False)
    (_, looped), gradients = jax.jit(loss_and_gradients(model))(unstack_blocks(params), images())
    assert "scan[" not in str(jax.make_jaxpr(forward(model))(unstack_blocks(params), images()))
    assert_close(looped, scanned)
    assert_close(stack_blocks(gradients), scanned_gradients, tol=1e-4)
    assert scanned[1]["blocks"]["residual"].shape == (L, B, N + 4, D)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_equals_plain(everything, remat):
    _, params, plain_results = everything
    model = tiny(**EVERYTHING, remat=remat)
    assert_close(jax.jit(loss_and_gradients(model))(params, images()), plain_results, tol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_recomputes_what_it_says(scan):
    """Products in the backward pass: "full" repeats all, "dots" that of queries and keys where no sums were kept."""

    def products(remat, **fields):
        model = tiny(scan=scan, remat=remat, pool="gap", **fields)
        jaxpr = jax.make_jaxpr(loss_and_gradients(model))(random_params(model), images())
        return count(jaxpr, "dot_general")

    blocks = 1 if scan else L  # in the program
    for fields, repeated in (
        ({"attention_impl": "cpu"}, 0),
        ({"attention_impl": "xla"}, 1),
        ({"return_attention": True}, 1),
    ):
        assert products("dots", **fields) - products("none", **fields) == repeated * blocks, fields
        assert products("full", **fields) - products("none", **fields) > 5 * blocks, fields


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "f32"), ("bfloat16", "ui16")])
@pytest.mark.parametrize(("pool", "turns"), [("none", 5), ("tok", 4)])
def test_on_cpus_the_scan_keeps_a_blocks_input_and_the_results_of_its_products(pool, turns, dtype, stored):
    """Stacks of other arrays, or of the same one twice, cost a third of a training step; bfloat16 ones are widened."""
    model = tiny(depth=5, dtype=dtype, pool=pool, class_token=True)
    step = jax.jit(jax.grad(lambda params, x: jnp.sum(model.apply({"params": params}, x, train=False)[0])))
    lines = step.lower(random_params(model), images()).as_text().splitlines()
    loops = [re.findall(rf"tensor<{turns}x(3x7x[^>]*|6x7x[^>]*)>", line) for line in lines if "stablehlo.while" in line]
    input_and_out, query_key_value_and_y, hidden = f"3x7x16x{stored}", f"3x7x2x8x{stored}", f"3x7x24x{stored}"
    expected = {input_and_out: 2, query_key_value_and_y: 4, hidden: 1, "6x7x1xf32": 1}
    assert [collections.Counter(loop) for loop in loops] == [expected, expected]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_a_loop_looks_up_of_the_parameters_is_not_kept_for_the_backward_pass(remat):
    model = tiny(depth=5, scan_unroll=1, remat=remat)
    step = jax.jit(jax.grad(lambda params, x: jnp.sum(model.apply({"params": params}, x, train=False)[0])))
    program = step.lower(random_params(model), images()).as_text()
    assert "tensor<5x16x24xf32>" in program
    assert "tensor<4x16x24xf32>" not in program


@pytest.mark.parametrize(
    ("backend", "fields", "turn"),
    [("cpu", {}, 1), ("gpu", {}, 4), ("gpu", dict(depth=30), 30), ("gpu", dict(scan_unroll=2), 2), ("tpu", {}, 1)],
)
def test_blocks_per_turn_of_the_scan(monkeypatch, backend, fields, turn):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for pool, apart in (("gap", 0), ("tok", 1)):
        model = ViT(**{**TINY, "depth": 4, "attention_impl": "xla", "pool": pool, **fields})
        jaxpr = jax.make_jaxpr(forward(model))(random_params(model), images())
        (scan,) = [eqn for eqn in all_equations(jaxpr) if eqn.primitive.name == "scan"]
        assert scan.params["length"] == model.depth - apart
        assert scan.params["unroll"] == turn


def test_unrolled_blocks_find_their_parameters_at_fixed_places():
    """Each as a slice of the stack that XLA can merge with what reads it, in both directions."""
    model = tiny(depth=3, scan_unroll=3, remat="none")
    step = jax.jit(jax.grad(lambda params, x: jnp.sum(model.apply({"params": params}, x, train=False)[0])))
    program = step.lower(random_params(model), images()).compile().as_text()
    assert "dynamic-slice(" not in program
    assert "dynamic-update-slice(" not in program


@pytest.mark.parametrize(("unroll", "scan", "prevents"), [(1, True, False), (2, True, True), (1, False, True)])
def test_what_is_computed_again_is_not_merged_with_the_first_time_outside_a_loop(unroll, scan, prevents):
    model = tiny(scan=scan, scan_unroll=unroll, remat="full")
    jaxpr = jax.make_jaxpr(loss_and_gradients(model))(random_params(model), images())
    found = {eqn.params["prevent_cse"] for eqn in all_equations(jaxpr) if "prevent_cse" in eqn.params}
    assert found == {prevents}


def test_remat_auto_is_dots_for_a_scan_on_the_cpu_and_nothing_else(monkeypatch):
    def program(**fields):
        model = tiny(**fields, attention_impl="xla")
        return str(jax.make_jaxpr(loss_and_gradients(model))(random_params(model), images()))

    def choices(**fields):
        return [program(**fields, remat=remat) for remat in ("none", "dots")]

    none, dots = choices(scan=True)
    assert none != dots
    assert program(scan=True) == dots
    assert program(scan=False) == choices(scan=False)[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    none, dots = choices(scan=True, scan_unroll=1)
    assert none != dots
    assert program(scan=True, scan_unroll=1) == none


@pytest.mark.parametrize(("pool", "in_the_scan"), [("gap", 2), ("tok", 1)])
def test_flaxs_own_capture_sees_every_block_of_a_scan(pool, in_the_scan):
    model = tiny(pool=pool)
    _, state = model.apply({"params": random_params(model)}, images(), train=False, capture_intermediates=True)
    seen = [x.shape for x in state["intermediates"]["blocks"]["mlp"]["__call__"]]
    last = [(B, 1, D), (B, N + 1, D)] if pool == "tok" else []
    assert seen == [(in_the_scan, B, N + (pool == "tok"), D), *last]


@pytest.mark.parametrize("fields", [{"pool": "tok"}, {"pool": "map", "scan": False}, {"remat": "full"}])
def test_second_derivatives_are_those_of_differences_or_refused(fields):
    """With respect to the image, whose gradient passes every part."""

    def slope_along(dtype, direction):
        model = tiny(dtype=dtype, **fields)
        params = random_params(model)
        return jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(loss_of(model, params))(x), direction)))

    x, direction, step = images(), images(seed=1), 3e-3
    model = tiny(**fields)
    gradient = jax.jit(jax.grad(loss_of(model, random_params(model))))
    difference = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    product = slope_along("float32", direction)(x)
    assert jnp.linalg.norm(product - difference) < 0.01 * jnp.linalg.norm(difference)
    with pytest.raises(NotImplementedError, match="dtype='float32'"):
        slope_along("bfloat16", direction)(x)


def loss_of(model, params):
    return lambda x: jnp.sum(jnp.sin(model.apply({"params": params}, x, train=False)[0]))


def test_what_nobody_reads_of_out_is_not_computed():
    """The stacked [l, b, n, d] outputs are in no buffer of the program that returns the logits only."""
    model = tiny(depth=5, pool="gap", class_token=True)
    params, stacked = random_params(model), "f32[5,3,7,16]"

    def loss(params, x):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x, train=False)[0]))

    assert stacked in forward(model).lower(params, images()).compile().as_text()
    assert stacked not in jax.jit(loss).lower(params, images()).compile().as_text()


def test_training_saves_nothing_for_outputs_that_nobody_reads():
    """Under full remat the scan stacks one [b, n, d] per block for the backward pass, its input, and none of `out`."""
    model = tiny(depth=5, remat="full", pool="gap", class_token=True)

    def loss(params, x, read_out):
        logits, out = model.apply({"params": params}, x, train=False)
        return jnp.sum(jnp.sin(jnp.sum(out["blocks"]["attention"] if read_out else logits)))

    def stacked_buffers(read_out):
        step = jax.jit(jax.grad(partial(loss, read_out=read_out)))
        lines = step.lower(random_params(model), images()).as_text().splitlines()
        return [line.count("tensor<5x3x7x16xf32>") for line in lines if "stablehlo.while" in line]

    assert stacked_buffers(read_out=False) == [1, 1]
    assert stacked_buffers(read_out=True) > [1, 1]
