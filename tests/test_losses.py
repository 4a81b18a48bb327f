import re
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_flax.losses import LOSSES, PROBABILITIES, as_evaluated, masked_mean, sigmoid_xent, softmax_xent

B, V = 8, 5


@pytest.fixture
def batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, V)).astype(np.float32) * 3
    targets = rng.dirichlet(np.ones(V), size=B).astype(np.float32)
    mask = np.array([True, True, False, True, True, True, False, True])
    return jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask)


def test_each_loss_says_what_its_probabilities_are():
    assert LOSSES.keys() == PROBABILITIES.keys()


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_softmax_xent_by_hand(batch):
    logits, targets, _ = batch
    want = -(np.asarray(targets) * log_softmax(logits)).sum(-1).mean()
    np.testing.assert_allclose(softmax_xent(logits, targets), want, rtol=1e-6)


def test_label_smoothing_by_hand(batch):
    logits, targets, mask = batch
    smoothed = 0.9 * np.asarray(targets) + 0.1 / V
    want = -(smoothed * log_softmax(logits)).sum(-1)[np.asarray(mask)].mean()
    np.testing.assert_allclose(softmax_xent(logits, targets, mask, label_smoothing=0.1), want, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_sigmoid_xent_by_hand(batch, reduction, threshold):
    logits, targets, mask = batch
    y, x = np.asarray(targets, np.float64), np.asarray(logits, np.float64)
    y = y if threshold is None else (y > threshold).astype(np.float64)
    y = 0.8 * y + 0.2 / V
    p = 1 / (1 + np.exp(-x))
    per_class = -(y * np.log(p) + (1 - y) * np.log(1 - p))[np.asarray(mask)]
    want = getattr(per_class, reduction)(-1).mean()
    got = sigmoid_xent(logits, targets, mask, label_smoothing=0.2, reduction=reduction, threshold=threshold)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sigmoid_xent_is_stable_at_large_logits():
    logits, targets = jnp.array([[200.0, -200.0]]), jnp.array([[0.0, 1.0]])
    loss, grad = jax.value_and_grad(sigmoid_xent)(logits, targets, reduction="sum")
    np.testing.assert_allclose(loss, 400.0)
    np.testing.assert_allclose(grad, [[1.0, -1.0]])


BOTH = pytest.mark.parametrize(
    "loss", [softmax_xent, partial(sigmoid_xent, reduction="sum")], ids=["softmax", "sigmoid"]
)


@BOTH
@pytest.mark.parametrize("rubbish", [jnp.inf, jnp.nan, 1e6])
def test_padding_changes_neither_loss_nor_gradient(batch, loss, rubbish):
    logits, targets, mask = batch
    kept = np.asarray(mask)
    want, want_grad = jax.value_and_grad(loss)(logits[kept], targets[kept])
    dirty = logits.at[2].set(rubbish)
    got, got_grad = jax.value_and_grad(loss)(dirty, targets, mask)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got_grad[kept], want_grad, rtol=1e-5, atol=1e-7)
    assert not got_grad[~kept].any()


@BOTH
@pytest.mark.parametrize(
    ("logits", "targets", "mask"),
    [((V, V, 3), (V, 3), V), ((V, 3), (V, 1), V), ((V, 3), (V, 3), 1), ((V, 3), (3, V), None), ((V,), (V,), None)],
    ids=str,
)
def test_shapes_that_would_broadcast_are_refused(monkeypatch, loss, logits, targets, mask):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a user's program
    shapes = re.escape(f"{logits}, {targets} and {mask and (mask,)}")
    with pytest.raises(ValueError, match=f"logits .b, v., targets .b, v. and a mask .b. .*found the shapes {shapes}"):
        loss(jnp.ones(logits), jnp.ones(targets), mask and jnp.ones(mask, bool))


def test_an_empty_mask_gives_zero():
    assert masked_mean(jnp.array([jnp.nan, 1.0]), jnp.array([False, False])) == 0.0


def test_sharded_batch_with_uneven_padding_equals_one_device(batch):
    logits, targets, mask = batch
    mesh = jax.make_mesh((8,), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    assert len(split.device_set) == 8
    step = jax.jit(jax.value_and_grad(softmax_xent))
    one, one_grad = step(logits, targets, mask)
    many, many_grad = step(*jax.device_put((logits, targets, mask), split))
    np.testing.assert_allclose(many, one, rtol=1e-6)
    np.testing.assert_allclose(many_grad, one_grad, rtol=1e-5, atol=1e-8)


def test_smoothing_may_be_traced_and_vmapped(batch):
    logits, targets, mask = batch
    amounts = jnp.array([0.0, 0.1])
    got = jax.jit(jax.vmap(lambda a: softmax_xent(logits, targets, mask, label_smoothing=a)))(amounts)
    want = [softmax_xent(logits, targets, mask, label_smoothing=a) for a in (0.0, 0.1)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32(batch):
    logits, targets, mask = batch
    half = logits.astype(jnp.bfloat16)
    for loss in (softmax_xent(half, targets, mask), sigmoid_xent(half, targets, mask, reduction="mean")):
        assert loss.dtype == jnp.float32
    np.testing.assert_allclose(
        softmax_xent(half, targets, mask), softmax_xent(half.astype(jnp.float32), targets, mask), rtol=1e-7
    )


def test_an_evaluation_takes_the_labels_as_they_are_and_the_loss_as_it_is(batch, monkeypatch):
    def power(logits, targets, mask, *, exponent, label_smoothing):
        return exponent * softmax_xent(logits, targets, mask, label_smoothing=label_smoothing)

    monkeypatch.setitem(LOSSES, "power", partial(power, label_smoothing=0.0))
    for name, smoothed, plain in (
        ("power", dict(exponent=3.0, label_smoothing=0.1), dict(exponent=3.0)),
        ("sigmoid_xent", dict(reduction="sum", threshold=0.3, label_smoothing=0.1), dict(reduction="sum")),
    ):
        assert as_evaluated(name, **smoothed)(*batch) == LOSSES[name](*batch, **plain)


def test_losses_are_found_by_name_and_a_wrong_reduction_is_named(batch):
    assert {"softmax_xent": softmax_xent, "sigmoid_xent": sigmoid_xent} == LOSSES
    with pytest.raises(ValueError, match="reduction='max'; expected one of sum, mean"):
        sigmoid_xent(*batch, reduction="max")
