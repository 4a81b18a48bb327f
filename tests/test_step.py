"""The step on a linear model: padding, parts of a batch, and parameters of few digits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.losses import softmax_xent
from vit_flax.optim import ema_update, make_optimizer
from vit_flax.step import classification, init_state, train_step

B, D, V = 16, 6, 4


def apply(variables, images, **_):
    return (images.reshape(len(images), -1) @ variables["params"]["w"]).astype(jnp.float32), {}


def optimizer(hparams):
    plain: dict[str, Any] = dict(
        name="sgd", momentum=None, lr=1.0, weight_decay=0.0, decay_mask=["w"], schedule="constant"
    )
    return make_optimizer(**plain, total_steps=10)


def take_step(mask, *, parts=1, dtype="float32", size=1.0, ema=False, rubbish=0.0) -> Any:
    """The state before and after a step of SGD with rate 1, and the metrics; `rubbish` is in the masked images."""
    rng = np.random.default_rng(0)
    mask = jnp.asarray(mask)
    images = jnp.asarray(rng.normal(size=(len(mask), 1, 1, D)), dtype)
    batch = {
        "image": jnp.where(mask[:, None, None, None], images, jnp.asarray(rubbish, dtype)),
        "label": jnp.asarray(rng.integers(0, V, len(mask)), jnp.int32),
        "mask": mask,
    }
    objective = partial(
        classification,
        apply=apply,
        augment=lambda key, images, targets, hparams: (images, targets),
        loss=lambda *batch, hparams: softmax_xent(*batch),
        num_classes=V,
    )
    state = init_state(
        jax.random.key(0),
        init=lambda key: {"w": jnp.asarray(size * rng.normal(size=(D, V)), dtype)},
        optimizer=optimizer,
        hparams={"run.ema_decay": jnp.float32(0.999)} if ema else {},
    )
    step = partial(train_step, objective=objective, optimizer=optimizer, accumulate_steps=parts)
    return state, *jax.jit(partial(step, ema_update=partial(ema_update, warmup=False)))(state, batch)


ROWS = np.arange(B)


@pytest.mark.parametrize("mask", [ROWS % 2 == 0, ROWS < 5, ROWS == 3, ROWS >= 0], ids=["holes", "end", "one", "full"])
@pytest.mark.parametrize("parts", [2, 4, 16])
def test_parts_equal_the_whole_whatever_the_mask(mask, parts):
    _, whole, one = take_step(mask, rubbish=1e3)
    _, cut, many = take_step(mask, parts=parts, rubbish=1e3)
    np.testing.assert_allclose(cut.params["w"], whole.params["w"], rtol=1e-5, atol=1e-6)
    assert {k: pytest.approx(float(v), rel=1e-5) for k, v in many.items()} == {k: float(v) for k, v in one.items()}
    assert one["top1"] > 0
    assert one["skipped"] == 0


@pytest.mark.parametrize("parts", [1, 4])
def test_a_batch_of_padding_changes_nothing(parts):
    before, after, metrics = take_step(np.zeros(B, bool), parts=parts)
    np.testing.assert_array_equal(after.params["w"], before.params["w"])
    assert (metrics["loss"], metrics["top1"], metrics["skipped"]) == (0.0, 0.0, 0)


@pytest.mark.parametrize("size", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_hit(size):
    """As in evaluations: a dead model does not score as one that always says class 0."""
    _, _, metrics = take_step(np.ones(B, bool), size=size)
    assert (metrics["top1"], metrics["skipped"]) == (0.0, 1)


def test_with_several_labels_each_of_them_is_a_hit_and_none_has_none():
    logits = jnp.asarray([[-9.0, 8, 9], [8, -9, 9], [-9, 9, 8], [9, 0, 0]])
    labels = jnp.asarray([[0, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]], jnp.uint8)
    batch = {"image": jnp.zeros((4, 1, 1, 1)), "label": labels, "mask": jnp.ones(4, bool)}
    _, metrics = classification(
        {},
        batch,
        jax.random.key(0),
        {},
        apply=lambda *_, **__: (logits, {}),
        augment=lambda key, images, targets, hparams: (images, targets),
        loss=lambda *batch, hparams: softmax_xent(*batch),
        num_classes=3,
    )
    assert metrics["top1"] == 0.5


def test_many_parts_of_bfloat16_are_summed_in_float32():
    mask = np.ones(256, bool)
    # The norm is that of the gradients as they are, before the optimiser rounds its update.
    exact, parts = (
        float(take_step(mask, parts=n, dtype=d)[2]["grad_norm"]) for n, d in ((1, "float32"), (256, "bfloat16"))
    )
    assert parts == pytest.approx(exact, rel=3e-3)


def test_norms_above_the_largest_float16_skip_no_step():
    before, after, metrics = take_step(np.ones(B, bool), dtype="float16", size=300.0)
    want = np.linalg.norm(np.asarray(after.params["w"], np.float64))
    assert want**2 > np.finfo(np.float16).max
    assert float(metrics["param_norm"]) == pytest.approx(want, rel=1e-4)
    assert metrics["skipped"] == 0
    assert (after.params["w"] != before.params["w"]).any()


def test_the_average_of_bfloat16_parameters_moves():
    before, after, _ = take_step(np.ones(B, bool), dtype="bfloat16", ema=True)
    assert after.ema["w"].dtype == jnp.float32
    old, new = (np.asarray(state.params["w"], np.float32) for state in (before, after))
    # XLA may average the new parameters before it rounds them to bfloat16: up to 2^-8 of 2.
    np.testing.assert_allclose(after.ema["w"] - old, 1e-3 * (new - old), atol=1e-5)
    assert np.abs(after.ema["w"] - old).max() > 5e-5
