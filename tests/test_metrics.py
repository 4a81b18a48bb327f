import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from vit_flax import metrics
from vit_flax.losses import PROBABILITIES, as_evaluated
from vit_flax.metrics import add_sums, average_precision, summarise, summarise_multilabel
from vit_flax.sharding import batch_sharding, make_mesh

N, V = 37, 7
LOSSES = {
    "softmax": dict(name="softmax_xent", label_smoothing=0.1),
    "sigmoid": dict(name="sigmoid_xent", label_smoothing=0.1, threshold=0.3, reduction="sum"),
    "sigmoid_mean": dict(name="sigmoid_xent", reduction="mean"),
}
SCORES = {k: dict(loss=as_evaluated(**s), probabilities=PROBABILITIES[s["name"]]) for k, s in LOSSES.items()}
batch_sums = partial(metrics.batch_sums, **SCORES["softmax"])
multilabel_batch_sums = partial(metrics.multilabel_batch_sums, loss=SCORES["sigmoid"]["loss"])


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, N)
    logits = rng.normal(size=(N, V)) + 2.0 * np.eye(V)[labels] * rng.random((N, 1))
    return logits.astype(np.float32), labels.astype(np.int32)


def total_over_batches(sums, logits, labels, batch_size, **section):
    """The total over batches of equal size, the last one padded with rubbish."""
    padding = -len(logits) % batch_size
    mask = np.arange(len(logits) + padding) < len(logits)
    rubbish = np.full((padding, *logits.shape[1:]), 1e6, np.float32)
    logits = np.concatenate([logits, rubbish])
    labels = np.concatenate([labels, np.zeros((padding, *labels.shape[1:]), labels.dtype)])
    step, total = jax.jit(lambda *batch: sums(*batch, **section)), None
    for start in range(0, len(logits), batch_size):
        here = slice(start, start + batch_size)
        total = add_sums(total, step(logits[here], labels[here], mask[here]))
    return total


def by_hand(logits, labels, kind="softmax"):
    logits, target = logits.astype(np.float64), np.eye(V)[labels]
    if kind == "softmax":
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        loss = -np.log(p[np.arange(len(labels)), labels]).mean()
    else:
        p = 1 / (1 + np.exp(-logits))
        per_class = -target * np.log(p) - (1 - target) * np.log(1 - p)
        loss = per_class.sum(-1).mean() if kind == "sigmoid" else per_class.mean()
    ranked = np.argsort(-logits, axis=-1)
    right = ranked[:, 0] == labels
    edges, ece = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (p.max(-1) > low) & (p.max(-1) <= high)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - p.max(-1)[inside].mean())
    return {
        "loss": loss,
        "count": float(len(labels)),
        "top1": right.mean(),
        "top5": (ranked[:, :5] == labels[:, None]).any(-1).mean(),
        "ece": ece,
    }


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("batch_size", [37, 10, 1])
def test_figures_by_hand_whatever_the_batching(scored, batch_size, kind):
    got = summarise(total_over_batches(partial(metrics.batch_sums, **SCORES[kind]), *scored, batch_size))
    want = by_hand(*scored, kind)
    assert want["top1"] < want["top5"] < 1.0
    assert got == {name: pytest.approx(value, rel=1e-5) for name, value in want.items()}


def test_confusion_matrix_counts_pairs(scored):
    logits, labels = scored
    total = total_over_batches(batch_sums, *scored, 10, confusion=True)
    want = np.zeros((V, V), np.int64)
    np.add.at(want, (labels, logits.argmax(-1)), 1)
    np.testing.assert_array_equal(total["confusion"], want)
    assert total["confusion"].dtype == np.int64
    assert "confusion" not in total_over_batches(batch_sums, *scored, 10)


def test_fewer_classes_than_five(scored):
    logits, labels = scored
    figures = summarise(total_over_batches(batch_sums, logits[:, :3], labels % 3, 10))
    assert figures["top5"] == 1.0
    assert figures["top1"] < 1.0


def test_equal_logits_are_no_hit_for_every_label():
    figures = summarise(add_sums(None, batch_sums(jnp.zeros((10, 10)), jnp.arange(10), jnp.ones(10, bool))))
    assert (figures["top1"], figures["top5"]) == (0.1, 0.5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_hit_and_no_prediction(scored, rubbish, kind):
    logits, labels = scored
    logits[::2, 3] = rubbish
    batch = jnp.asarray(logits), jnp.asarray(labels), jnp.ones(N, bool)
    got = add_sums(None, metrics.batch_sums(*batch, **SCORES[kind], confusion=True))
    want = by_hand(logits[1::2], labels[1::2])
    figures = summarise(got)
    assert (figures["top1"] * N, figures["top5"] * N) == (
        pytest.approx(want["top1"] * (N // 2)),
        pytest.approx(want["top5"] * (N // 2)),
    )
    assert np.isnan(figures["loss"])
    assert got["class_top1"].sum() == got["top1"] == np.trace(got["confusion"])
    assert got["class_predicted"].sum() == got["confusion"].sum() == N // 2


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("label", [-1, V])
def test_a_label_that_is_no_class_shows_in_the_loss_unless_masked(scored, label, kind):
    batch_sums = partial(metrics.batch_sums, **SCORES[kind])
    logits, labels = scored
    labels = labels.copy()
    labels[3] = label
    mask = np.ones(N, bool)
    got = summarise(add_sums(None, batch_sums(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask))))
    assert np.isnan(got["loss"])
    mask[3] = False
    got = summarise(add_sums(None, batch_sums(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask))))
    assert got["loss"] == pytest.approx(by_hand(logits[mask], labels[mask], kind)["loss"], rel=1e-5)


def test_totals_do_not_lose_small_batches():
    sums = {"count": np.int32(1), "loss": np.float32(1e-3)}
    total = add_sums({"count": np.int64(2**40), "loss": np.float64(1e9)}, sums)
    assert total["count"] == 2**40 + 1
    assert total["loss"] - 1e9 == pytest.approx(1e-3, rel=1e-3)


def test_sharded_batch_equals_one_device(scored):
    logits, labels = scored[0][:32], scored[1][:32]
    mask = np.arange(32) < 30
    split = batch_sharding(make_mesh())
    step = jax.jit(batch_sums)
    one, many = step(logits, labels, mask), step(*jax.device_put((logits, labels, mask), split))
    assert summarise(add_sums(None, one)) == {
        k: pytest.approx(v, rel=1e-6) for k, v in summarise(add_sums(None, many)).items()
    }


def test_nothing_evaluated_is_an_error():
    empty = add_sums(None, batch_sums(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), jnp.zeros(2, bool)))
    with pytest.raises(ValueError, match="No example was evaluated"):
        summarise(empty)


@pytest.mark.parametrize("batch_size", [37, 10])
def test_multilabel_figures_by_hand(scored, batch_size):
    logits = scored[0]
    labels = (np.random.default_rng(1).random((N, V)) < 0.3).astype(np.uint8)
    labels[:, 2] = 0
    got, per_class = summarise_multilabel(total_over_batches(multilabel_batch_sums, logits, labels, batch_size))
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    loss = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(-1).mean()
    precision = [average_precision_score(labels[:, v], logits[:, v]) for v in range(V) if v != 2]
    assert got == {
        "loss": pytest.approx(loss, rel=1e-5),
        "count": N,
        "mean_average_precision": pytest.approx(np.mean(precision), rel=1e-6),
    }
    np.testing.assert_allclose(per_class, np.insert(precision, 2, np.nan), rtol=1e-6)


def test_average_precision_treats_equal_scores_as_one_threshold():
    rng = np.random.default_rng(2)
    scores, labels = rng.integers(0, 4, (50, 3)).astype(float), rng.random((50, 3)) < 0.4
    want = [average_precision_score(labels[:, v], scores[:, v]) for v in range(3)]
    np.testing.assert_allclose(average_precision(scores, labels), want, rtol=1e-12)
    reordered = rng.permutation(50)
    np.testing.assert_allclose(average_precision(scores[reordered], labels[reordered]), want, rtol=1e-12)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_find_nothing(rubbish):
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(50, 3)), rng.random((50, 3)) < 0.4
    bad = rng.random((50, 3)) < 0.3
    want = []
    for y, score, left in zip(labels.T, scores.T, ~bad.T):
        want.append(average_precision_score(y[left], score[left]) * y[left].sum() / y.sum())
    np.testing.assert_allclose(average_precision(np.where(bad, rubbish, scores), labels), want, rtol=1e-12)


def test_no_class_with_positives_has_no_average_precision():
    sums = multilabel_batch_sums(jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32), jnp.ones(2, bool))
    assert np.isnan(summarise_multilabel(add_sums(None, sums))[0]["mean_average_precision"])
