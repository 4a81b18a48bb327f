"""Pooling and heads, against the same in NumPy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_flax.models.block import Attention, Mlp
from vit_flax.models.heads import POOLS, classify
from vit_flax.models.layers import LayerNorm
from vit_flax.models.linear import Linear

B, N, D, K, E, F, V = 2, 7, 6, 2, 4, 5, 3
PREFIX = 2  # tokens in front of the patches
TOKENS = np.random.default_rng(0).standard_normal((B, N, D))


class Pooled(nn.Module):
    """A pooling by itself, made of the model's own parts."""

    pool: str
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        dtypes = dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype("float32"))
        linear, dropout = partial(Linear, **dtypes), partial(nn.Dropout, 0.0, deterministic=True)
        attention = partial(
            Attention,
            num_heads=K,
            head_dim=E,
            linear=linear,
            bias="qkv",
            qk_norm=None,
            rope=None,
            dropout=dropout,
            impl="xla",
            return_weights=False,
        )
        mlp = partial(Mlp, hidden=F, activation=jnp.tanh, linear=linear, norm=None, dropout=dropout)
        norm = partial(LayerNorm, epsilon=1e-6, **dtypes)
        return POOLS[self.pool].make(prefix=PREFIX, attention=attention, mlp=mlp, norm=norm)(x)


def random_params(module: nn.Module, *inputs) -> dict:
    """Parameters in float32, none of them zero or one."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs).get("params", {})
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.float32(rng.standard_normal(leaf.shape)), shapes)


def attention_pooling(x, params):
    """The probe attends to the patches; then an MLP with a skip connection (arXiv:2106.04560)."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["pool"])
    patches, attention, mlp = x[:, PREFIX:], p["attention"], p["mlp"]
    q = np.einsum("d,dke->ke", p["probe"][0, 0], attention["query"]["kernel"]) + attention["query"]["bias"]
    k, v = (
        np.einsum("bnd,dke->bnke", patches, attention[i]["kernel"]) + attention[i]["bias"] for i in ("key", "value")
    )
    weights = np.exp(np.einsum("ke,bnke->bnk", q, k) / np.sqrt(E))
    attended = np.einsum("bnk,bnke->bke", weights / weights.sum(1, keepdims=True), v)
    y = np.einsum("bke,ked->bd", attended, attention["out"]["kernel"]) + attention["out"]["bias"]
    z = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-6)
    z = z * p["norm"]["scale"] + p["norm"]["bias"]
    hidden = np.tanh(z @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"])
    return y + hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]


EXPECTED = {
    "tok": lambda x, _: x[:, 0],
    "gap": lambda x, _: x[:, PREFIX:].mean(1),
    "map": attention_pooling,
    "none": lambda x, _: x,
    "tok_gap": lambda x, _: np.concatenate([x[:, 0], x[:, PREFIX:].mean(1)], axis=1),
    "tok_dist": lambda x, _: x[:, :2],
}


@cache
def params_and_pooling(pool: str):
    params = random_params(Pooled(pool), jnp.float32(TOKENS))
    apply = jax.jit(Pooled(pool).apply)
    return params, lambda x: apply({"params": params}, jnp.float32(x))


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_is_its_definition(pool):
    params, pooling = params_and_pooling(pool)
    np.testing.assert_allclose(pooling(TOKENS), EXPECTED[pool](TOKENS, params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", [pool for pool in POOLS if pool != "none"])
def test_pooling_reads_the_tokens_that_it_says_it_needs(pool):
    _, pooling = params_and_pooling(pool)
    reads = []
    for token in range(PREFIX):
        changed = TOKENS.copy()
        changed[:, token] += 1
        reads.append(bool((pooling(changed) != pooling(TOKENS)).any()))
    assert reads == [POOLS[pool].needs_class_token, POOLS[pool].needs_dist_token]


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_keeps_the_dtype_of_the_tokens_and_float32_parameters(pool):
    x = jnp.asarray(TOKENS, jnp.bfloat16)
    y, variables = jax.eval_shape(Pooled(pool, "bfloat16").init_with_output, jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} <= {jnp.dtype("float32")}


class Classified(nn.Module):
    pool: str

    @nn.compact
    def __call__(self, x):
        float32 = jnp.dtype("float32")
        return classify(x, partial(Linear, V, dtype=float32, param_dtype=float32), pool=self.pool)


@pytest.mark.parametrize("pool", POOLS)
def test_logits_are_those_of_one_head_or_the_mean_of_two(pool):
    x = EXPECTED[pool](TOKENS, params_and_pooling(pool)[0])
    params = random_params(Classified(pool), jnp.float32(x))
    logits, each = Classified(pool).apply({"params": params}, jnp.float32(x))
    features = {"head": x[:, 0], "head_dist": x[:, 1]} if pool == "tok_dist" else {"head": x}
    assert params.keys() == features.keys()
    expected = [features[name] @ np.asarray(p["kernel"]) + np.asarray(p["bias"]) for name, p in params.items()]
    np.testing.assert_allclose(logits, np.mean(expected, axis=0), rtol=1e-5, atol=1e-5)
    assert [*each] == (["token", "dist"] if pool == "tok_dist" else [])
    for name, head in {"token": "head", "dist": "head_dist"}.items():
        if name in each:
            np.testing.assert_allclose(each[name], expected[[*params].index(head)], rtol=1e-5, atol=1e-5)
