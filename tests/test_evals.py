"""Evaluations against figures by hand, on a model that is a table."""

import base64
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, precision_score, recall_score

from tests.test_train_log import Collected
from vit_flax import metrics, sharding
from vit_flax.evals import EVALS
from vit_flax.evals.hook import EvaluationHook
from vit_flax.evals.samples import NUM_WRONG, Samples, data_uri
from vit_flax.evals.weights import one_late
from vit_flax.losses import PROBABILITIES, as_evaluated
from vit_flax.step import TrainState
from vit_flax.train_log import TrainLog
from vit_flax.writer import Writer

N, V, BATCH = 29, 4, 8
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, 2, 2, 1), np.uint8)
LABELS = RNG.integers(0, V, N).astype(np.int32)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4, V)), jnp.float32)}
STATE = TrainState(*[None] * 8).replace(step=jnp.int32(3), params=PARAMS)


def apply(variables, images, train):
    assert not train
    return images.reshape(len(images), -1) @ variables["params"]["w"], {}


def normalize(images):
    return images.astype(jnp.float32) / 255 - 0.5


def logits(params=PARAMS):
    return (IMAGES.reshape(N, -1) / np.float32(255) - np.float32(0.5)) @ np.asarray(params["w"])


def batches(labels=LABELS):
    """Host batches; the last one is padded with rubbish."""
    rows = -(-N // BATCH) * BATCH
    images = np.concatenate([IMAGES, np.full((rows - N, *IMAGES.shape[1:]), 255, np.uint8)])
    labels = np.concatenate([labels, np.zeros((rows - N, *labels.shape[1:]), labels.dtype)])
    mask = np.arange(rows) < N
    for start in range(0, rows, BATCH):
        here = slice(start, start + BATCH)
        yield {"image": images[here], "label": labels[here], "mask": mask[here]}


def make(kind="classification", labels=LABELS, apply=apply, **loss):
    mesh, loss = sharding.make_mesh(), {"name": "softmax_xent"} | loss
    return EVALS[kind](
        apply=apply,
        normalize=normalize,
        batches=lambda: batches(labels),
        put=lambda batch: sharding.put_batch(batch, mesh, BATCH),
        rows=sharding.batch_sharding(mesh),
        num_classes=V,
        loss=as_evaluated(**loss),
        probabilities=PROBABILITIES[loss["name"]],
    )


def test_classification_counts_each_example_once_on_eight_devices():
    assert jax.device_count() == 8
    evaluation = make()
    figures = evaluation.run(STATE)
    assert set(figures) == set(evaluation.figures)  # the names that checkpoint.best_metric may have
    guesses = logits().argmax(-1)
    assert figures["count"] == N
    assert figures["top1"] == pytest.approx((guesses == LABELS).mean())
    matrix = np.zeros((V, V), int)
    np.add.at(matrix, (LABELS, guesses), 1)
    assert evaluation.details["confusion"] == matrix.tolist()
    assert evaluation.details["class_count"] == np.bincount(LABELS, minlength=V).tolist()
    recall = np.array(evaluation.details["class_top1"]) / evaluation.details["class_count"]
    np.testing.assert_allclose(recall, recall_score(LABELS, guesses, average=None))
    precision = np.array(evaluation.details["class_top1"]) / evaluation.details["class_predicted"]
    np.testing.assert_allclose(precision, precision_score(LABELS, guesses, average=None))


def test_the_moving_average_is_evaluated_beside_the_weights_and_described_by_the_details():
    average = {"w": -PARAMS["w"]}
    evaluation = make()
    figures = evaluation.run(STATE.replace(ema=average))
    assert figures["top1"] == pytest.approx((logits().argmax(-1) == LABELS).mean())
    assert figures["ema_top1"] == pytest.approx((logits(average).argmax(-1) == LABELS).mean())
    assert figures["top1"] != figures["ema_top1"]
    assert np.trace(evaluation.details["confusion"]) == round(N * figures["ema_top1"])
    assert not any(name.startswith("ema_") for name in make().run(STATE))


def test_samples_are_real_rows_with_their_probabilities():
    evaluation = make()
    evaluation.run(STATE)
    scores = np.exp(logits()) / np.exp(logits()).sum(-1, keepdims=True)
    samples = evaluation.details["samples"]
    wrong = [s for s in samples if s["classes"][0] != s["label"]]
    right = [s for s in samples if s["classes"][0] == s["label"]]
    assert samples == wrong + right
    assert len(wrong) == min(NUM_WRONG, (logits().argmax(-1) != LABELS).sum())
    assert {s["label"] for s in right} == set(LABELS[logits().argmax(-1) == LABELS].tolist())
    for sample in samples:
        assert sample["label"] == LABELS[sample["row"]]
        np.testing.assert_array_equal(sample["image"], IMAGES[sample["row"]])
        np.testing.assert_allclose(sample["probabilities"], np.sort(scores[sample["row"]])[::-1], rtol=1e-5)
        assert sample["classes"] == np.argsort(-scores[sample["row"]]).tolist()
    sure = np.where(logits().argmax(-1) == LABELS, -1, scores.max(-1))
    assert [s["row"] for s in wrong] == np.argsort(-sure)[: len(wrong)].tolist()


def test_a_sigmoid_loss_gives_each_class_a_probability_of_its_own_and_ranks_the_sure_ones():
    def sure(variables, images, train):
        return 20 + 5 * apply(variables, images, train)[0], {}

    assert np.mean(jax.nn.sigmoid(20 + 5 * logits()) == 1) > 0.5  # in float32
    evaluation = make(apply=sure, name="sigmoid_xent", reduction="sum")
    figures = evaluation.run(STATE)
    assert figures["top1"] == pytest.approx((logits().argmax(-1) == LABELS).mean())
    for sample in evaluation.details["samples"]:
        x = (20 + 5 * logits()[sample["row"]]).astype(np.float64)
        assert sample["classes"] == np.argsort(-x).tolist()
        np.testing.assert_allclose(sample["probabilities"], 1 / (1 + np.exp(-np.sort(x)[::-1])), rtol=1e-4)


def test_many_wrong_predictions_keep_the_surest():
    samples = Samples(2)
    sure = RNG.random(100).astype(np.float32)
    for start in range(0, 100, 10):
        here = slice(start, start + 10)
        batch = {"image": np.zeros((10, 1, 1, 1), np.uint8), "label": np.zeros(10, int), "mask": np.ones(10, bool)}
        samples.add(batch, np.stack([sure[here], 1 - sure[here]], 1), np.tile([1, 0], (10, 1)))
    assert [s["row"] for s in samples.chosen()] == np.argsort(-sure)[:NUM_WRONG].tolist()


def test_multilabel_figures_and_details(monkeypatch):
    labels = (RNG.random((N, V)) < 0.4).astype(np.uint8)
    labels[:, 2] = 0
    evaluation = make("multilabel", labels)
    ranked, rank = [], metrics.average_precision
    monkeypatch.setattr(metrics, "average_precision", lambda *a: ranked.append(len(a)) or rank(*a))
    figures = evaluation.run(STATE)
    assert len(ranked) == 1  # it sorts the whole split
    assert set(figures) == set(evaluation.figures)
    want = [average_precision_score(labels[:, v], logits()[:, v]) if v != 2 else None for v in range(V)]
    assert evaluation.details["class_count"] == labels.sum(0).tolist()
    assert evaluation.details["class_average_precision"] == [None if p is None else pytest.approx(p) for p in want]
    assert figures["mean_average_precision"] == pytest.approx(np.mean([p for p in want if p is not None]))
    assert figures["count"] == N


@pytest.mark.parametrize("kind", EVALS)
def test_an_empty_split_is_an_error(kind):
    evaluation = make(kind)
    evaluation._batches = list
    with pytest.raises(ValueError, match="the split is empty"):
        evaluation.run(STATE)


def test_a_result_is_fetched_after_the_next_batch_was_dispatched():
    events = []
    for batch, result in one_late(lambda b: events.append(f"dispatch {b}") or b, [1, 2, 3], lambda b: b):
        assert batch == result
        events.append(f"fetch {batch}")
    assert events == ["dispatch 1", "dispatch 2", "fetch 1", "dispatch 3", "fetch 2", "fetch 3"]
    assert list(one_late(lambda b: b, [], lambda b: b)) == []


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 3), (8, 9, 4), (300, 200, 3), (200, 300, 1)])
def test_data_uri_is_a_picture(shape):
    image = RNG.integers(0, 256, shape, np.uint8)
    head, data = data_uri(image).split(",")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert head == f"data:image/{'png' if max(shape) <= 64 else 'jpeg'};base64"
    assert max(picture.shape) == min(160, max(shape[:2]))
    if max(shape) <= 64:
        np.testing.assert_array_equal(picture, image if shape[2] == 3 else image[..., 0])


class Log(TrainLog):
    """Remembers what it was asked."""

    def __init__(self):
        self.excluded, self.flushed = [], 0

    def flush(self):
        self.flushed += 1

    def exclude(self, secs):
        self.excluded.append(secs)


def run_hook(tmp_path, state, **arguments):
    sink, results = Collected(), {}
    with Writer(tmp_path, {"s": lambda: sink}, start_step=0, total_steps=9) as writer:
        defaults = dict(
            weights=lambda opt_state, params: params,
            log=None,
            class_names=("a", "b", "<c>", "d"),
            example_id=lambda row: f"picture {row}",
        )
        EvaluationHook("val", make(), writer=writer, results=results, **(defaults | arguments))(5, state)
    return sink.lines, results, json.loads((tmp_path / "evals/val.json").read_text())


def test_hook_writes_figures_pictures_and_details(tmp_path, capsys):
    lines, results, details = run_hook(tmp_path, STATE.replace(ema=PARAMS))
    assert lines[0] == {"step": 5, **results}
    assert lines[1][:2] == (5, "val/confusion")
    assert results["val/top1"] == results["val/ema_top1"] == np.trace(details["confusion"]) / N
    assert (details["step"], details["weights"]) == (5, "moving average of the parameters")
    assert details["class_names"] == ["a", "b", "<c>", "d"]
    assert all(s["id"] == f"picture {s['row']}" and s["image"].startswith("data:") for s in details["samples"])
    said = capsys.readouterr().out
    assert "step 5 val/loss" in said
    assert f"val/count {N}  " in said


def test_hook_evaluates_the_weights_that_the_optimiser_names(tmp_path):
    state = STATE.replace(opt_state=-1.0)
    weights = {"w": PARAMS["w"] * -1.0}
    _, results, details = run_hook(tmp_path, state, weights=lambda opt_state, params: {"w": params["w"] * opt_state})
    assert results["val/top1"] == pytest.approx((logits(weights).argmax(-1) == LABELS).mean())
    assert details["weights"] == "parameters"


def test_hook_leaves_its_time_out_of_the_throughput(tmp_path):
    log = Log()
    run_hook(tmp_path, STATE, log=log)
    assert log.flushed == 1
    assert len(log.excluded) == 1
