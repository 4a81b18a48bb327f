"""Attention against the equation in float64, in every implementation that runs here."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.models import ViT
from vit_flax.models import attend as module
from vit_flax.models.attend import IMPLEMENTATIONS, attend, attend_with_weights, padding, why_not_cudnn

B, Q, S, K, E = 2, 5, 7, 3, 8
HERE = [name for name in IMPLEMENTATIONS if name != "cudnn"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def inputs(dtype="float32", queries=Q, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = ((B, queries, K, E), (B, S, K, E), (B, S, K, E), (B, queries, K, E))
    return [jnp.asarray(scale * rng.standard_normal(shape), dtype) for shape in shapes]


def by_the_equation(q, k, v, dy):
    """Result and gradients of sum(y * dy), head by head, in float64."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    y, (dq, dk, dv) = np.zeros_like(q), (np.zeros_like(x) for x in (q, k, v))
    for b in range(B):
        for h in range(K):
            logits = q[b, :, h] @ k[b, :, h].T / np.sqrt(E)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            y[b, :, h] = weights @ v[b, :, h]
            dweights = dy[b, :, h] @ v[b, :, h].T
            dlogits = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True)) / np.sqrt(E)
            dq[b, :, h], dk[b, :, h], dv[b, :, h] = (
                dlogits @ k[b, :, h],
                dlogits.T @ q[b, :, h],
                weights.T @ dy[b, :, h],
            )
    return y, dq, dk, dv


def assert_near(got, want, tolerance):
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, want):
        difference = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert difference < tolerance, f"{name}: {difference}"


def value_and_gradients(function, q, k, v, dy):
    y, vjp = jax.vjp(function, q, k, v)
    return (y, *vjp(dy))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("impl", HERE)
def test_result_and_gradients_are_those_of_the_equation(impl, dtype):
    q, k, v, dy = inputs(dtype)
    with jax.numpy_dtype_promotion("standard"):  # which the backward pass of `jax.nn` needs
        got = jax.jit(lambda *x: value_and_gradients(lambda q, k, v: attend(q, k, v, impl=impl), *x))(q, k, v, dy)
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    assert_near(got, by_the_equation(q, k, v, dy), TOLERANCE[dtype])


@pytest.mark.parametrize("impl", HERE)
def test_one_query_as_of_a_pooling_head(impl):
    q, k, v, dy = inputs(queries=1)
    got = value_and_gradients(lambda q, k, v: attend(q, k, v, impl=impl), q, k, v, dy)
    assert_near(got, by_the_equation(q, k, v, dy), 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("impl", HERE)
def test_an_empty_batch_gives_an_empty_result(impl, dtype):
    empty = [x[:0] for x in inputs(dtype)]
    with jax.numpy_dtype_promotion("standard"):  # which the backward pass of `jax.nn` needs
        got = value_and_gradients(lambda q, k, v: attend(q, k, v, impl=impl), *empty)
    assert [x.shape for x in got] == [empty[i].shape for i in (3, 0, 1, 2)]


@pytest.mark.parametrize("impl", HERE)
def test_logits_beyond_the_range_of_exp_overflow_nowhere(impl):
    q, k, v, dy = inputs(scale=100.0)
    got = value_and_gradients(lambda q, k, v: attend(q, k, v, impl=impl), q, k, v, dy)
    assert np.abs(np.einsum("bqke,bske->bkqs", q, k)).max() / np.sqrt(E) > 1e4
    assert_near(got[:1], by_the_equation(q, k, v, dy)[:1], 1e-5)
    assert all(np.isfinite(x).all() for x in got)


@pytest.mark.parametrize("impl", HERE)
def test_members_of_a_vmapped_sweep_do_not_mix(impl):
    members = [inputs(scale=scale) for scale in (0.5, 1.0)]
    stacked = [jnp.stack(x) for x in zip(*members)]
    run = lambda *x: value_and_gradients(lambda q, k, v: attend(q, k, v, impl=impl), *x)  # noqa: E731
    together = jax.vmap(run)(*stacked)
    for i, member in enumerate(members):
        assert_near([x[i] for x in together], by_the_equation(*member), 1e-5)


def test_the_open_form_shows_the_weights_and_gives_dropout_its_turn():
    q, k, v, dy = inputs()
    y, weights = attend_with_weights(q, k, v, dropout=lambda w: w)
    assert_near([y], by_the_equation(q, k, v, dy), 1e-5)
    np.testing.assert_allclose(np.einsum("bkqs,bske->bqke", weights, v), y, atol=1e-5)
    dropped, same = attend_with_weights(q, k, v, dropout=jnp.zeros_like)
    assert not dropped.any()
    np.testing.assert_array_equal(same, weights)


def test_cudnn_asked_for_by_name_says_why_it_cannot_run():
    q, k, v, _ = inputs("bfloat16")
    with pytest.raises(ValueError, match=r"'cudnn' cannot run here: .*the backend is 'cpu'\. Use 'auto' or 'xla'"):
        attend(q, k, v, impl="cudnn")


@pytest.fixture
def gpu(monkeypatch):
    """Makes JAX believe in an NVIDIA GPU, as far as it is asked while it traces; nothing can be run."""
    checks = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

    def pretend(capability="9.0", cudnn=91100):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
        monkeypatch.setattr(checks, "is_cuda_compute_capability_equal", lambda it: capability == it)
        monkeypatch.setattr(checks, "check_compute_capability", lambda least: float(capability) >= float(least))
        if cudnn:
            monkeypatch.setattr(checks, "check_cudnn_version", lambda: cudnn)

    return pretend


@pytest.mark.parametrize(
    ("machine", "dtype", "head_dim", "words"),
    [
        (dict(capability="8.0"), "bfloat16", 64, None),
        (dict(capability="9.0"), "float16", 128, None),
        (dict(capability="7.5"), "bfloat16", 64, "compute capability 8.0"),
        (dict(capability="gfx90a"), "bfloat16", 64, "compute capability 8.0"),
        (dict(capability="10.3", cudnn=90000), "bfloat16", 64, "cuDNN version >= 9.11"),
        (dict(cudnn=None), "bfloat16", 64, "cuDNN is not detected"),
        ({}, "float32", 64, "bfloat16 or float16"),
        ({}, "bfloat16", 60, "multiple of 8"),
        (dict(capability="8.0"), "bfloat16", 136, "<= 128"),
    ],
)
@pytest.mark.parametrize("tokens", [2, 3])
def test_what_cudnn_can_take(gpu, monkeypatch, machine, dtype, head_dim, words, tokens):
    gpu(**machine)
    arrays = [jnp.zeros((1, tokens, 1, head_dim), dtype)] * 3
    reason = why_not_cudnn(*arrays)
    assert (reason is None) if words is None else (words in reason)
    chosen = []
    for name in ("_cpu", "_xla", "_cudnn"):
        monkeypatch.setattr(module, name, lambda q, k, v, length=None, name=name: chosen.append(name) or q)
    module._auto(*arrays, None)
    assert chosen == ["_cudnn" if words is None else "_xla"]
    assert [padding(arrays[0], impl=impl) for impl in ("auto", "cudnn", "xla")] == [tokens % 2 * (not words)] * 2 + [0]


@pytest.mark.parametrize(
    ("queries", "keys", "length"),
    [(5, 7, None), (1, 7, None), (1, 6, None), (4, 6, None), (197, 197, None), (6, 6, 5), (1, 6, 5)],
)
def test_cudnn_gets_even_numbers_of_tokens_and_the_result_is_the_same(monkeypatch, queries, keys, length):
    """With the same function of JAX in its other implementation, which runs here; behind `length`, nothing counts."""
    seen, attention = [], jax.nn.dot_product_attention

    @jax.custom_vjp
    def masked(q, k, v, lengths):
        return attention(q, k, v, implementation="xla", **lengths)

    def backward(saved, dy):
        *x, lengths = saved
        dq, dk, dv = jax.vjp(lambda *x: attention(*x, implementation="xla", **lengths), *x)[1](dy)
        behind = jnp.arange(keys)[None, :, None, None] >= (length or keys)
        dk, dv = (jnp.where(behind, jnp.nan, d[:, :keys]) if length else d for d in (dk, dv))  # as if left unwritten
        return dq, dk, dv, None

    masked.defvjp(lambda *x: (masked(*x), x), backward)

    def elsewhere(q, k, v, *, implementation, **lengths):
        seen.append((implementation, q.shape[1] % 2, k.shape[1] % 2, v.shape[1] % 2))
        return masked(q, k, v, lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", elsewhere)
    rng = np.random.default_rng(0)
    q, dy, k, v = (jnp.asarray(rng.standard_normal((B, n, K, E)), "float32") for n in (queries, queries, keys, keys))
    with jax.numpy_dtype_promotion("standard"):  # which the backward pass of this other implementation needs
        got = value_and_gradients(lambda *x: module._fused(*x, length), q, k, v, dy.at[:, length or queries :].set(0))
    assert_near([x[:, :length] for x in got], by_the_equation(*(x[:, :length] for x in (q, k, v, dy))), 1e-5)
    y, *gradients = got
    assert np.isfinite(y).all()
    assert length is None or not any(x[:, length:].any() for x in gradients)
    assert seen == [("cudnn", 0, 0, 0)]


@pytest.mark.parametrize("queries", [1, 8, 197])
def test_cudnn_is_lowered_in_both_directions(gpu, queries):
    gpu()
    q, k = (jax.ShapeDtypeStruct((2, n, 3, 64), jnp.bfloat16) for n in (queries, 8 if queries == 8 else 197))
    function = jax.jit(lambda *x: jax.vjp(attend, *x)[1](x[0]))
    members = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (q, k, k)]  # as of a vmapped sweep
    for lowered in (function.trace(q, k, k), jax.jit(jax.vmap(function)).trace(*members)):
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        assert "__cudnn$fmhaSoftmax(" in text
        assert "__cudnn$fmhaSoftmaxBackward(" in text


@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
def test_a_model_with_a_class_token_trains_on_cudnn(gpu, remat):
    gpu()
    model = ViT(num_classes=5, patch_size=8, width=64, depth=2, mlp_dim=64, num_heads=1, dtype="bfloat16", remat=remat)
    images = jnp.zeros((2, 16, 16, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    loss = jax.jit(jax.grad(lambda params: model.apply(params, images, train=False)[0].astype("float32").sum()))
    text = loss.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward(" in text


def test_tokens_are_padded_once_and_not_in_every_block(gpu):
    gpu()
    model = ViT(num_classes=5, patch_size=8, width=64, depth=3, mlp_dim=64, num_heads=1, dtype="bfloat16", scan=False)
    images = jnp.zeros((2, 16, 16, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    forward = jax.jit(lambda params: model.apply(params, images, train=False)[0])
    text = forward.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == 3
    padded = re.findall(r"stablehlo\.pad.*-> tensor<([\dx]+)xbf16>", text)
    assert sorted(padded) == ["2x2x1x64", "2x6x64"]  # the only query of the last block, and the tokens: 5 -> 6
