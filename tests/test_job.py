"""That what a config says reaches the step, the log and the evaluations."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import csv_rows, metrics_lines, tiny_config
from vit_flax import job as job_module
from vit_flax import load_pretrained, train_log
from vit_flax.augment import augment
from vit_flax.checkpoint import Checkpoints
from vit_flax.config import ConfigError, bind, in_steps
from vit_flax.job import build
from vit_flax.optim import eval_params
from vit_flax.signals import StopSignal
from vit_flax.step import OBJECTIVES
from vit_flax.trainer import evaluate, train


def steps_of(config, count=1):
    """The state before, the state after so many steps, and the metrics of the last."""
    job = build(config)
    places = jax.tree.map(lambda x: x.sharding, job.abstract_state())
    first = jax.jit(job.init, out_shardings=places)()
    state, step, batches = jax.tree.map(jnp.copy, first), job.train_step(), job.train_batches(0)
    for _ in range(count):
        state, metrics = step(state, next(batches))
    return first, state, metrics


def quiet(**overrides):
    """No augmentation, no dropping: the step depends on the batch alone."""
    config = tiny_config(model__drop_path=0.0, optim__warmup_steps=0, **overrides)
    config.augment = dict(mean=(0.5,), std=(0.5,), mixup_alpha=0.0, cutmix_alpha=0.0)
    return config


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    config = tiny_config(model__dtype="bfloat16")
    _, state, metrics = steps_of(config, count=3)
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
    assert np.isfinite(float(metrics["loss"]))
    job = build(config)
    images = jnp.zeros((1, *job.data.image_shape))
    logits, out = job.model.apply({"params": state.params}, images, train=False)
    assert logits.dtype == jnp.float32
    assert out["tokens"].dtype == jnp.bfloat16
    batch = {"image": np.zeros((64, 8, 8, 1), np.uint8), "label": np.zeros(64, np.int32), "mask": np.ones(64, bool)}
    assert "bf16" in job.train_step().lower(job.abstract_state(), batch).as_text()
    assert "bf16" not in build(tiny_config()).train_step().lower(job.abstract_state(), batch).as_text()
    _, exact, _ = steps_of(tiny_config(), count=3)
    close = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, jax.device_get((state.params, exact.params))))]
    assert 0 < max(close) < 0.02


def test_another_objective_is_an_entry_and_a_section(monkeypatch):
    """As docs/architecture.md says: its keywords are keys that are checked, and the step minimises it."""

    def calm(params, batch, key, hparams, *, strength: float, apply, **_):
        logits, _ = apply({"params": params}, batch["image"] / 255, train=True, rngs={"dropout": key}, hparams=hparams)
        return strength * jnp.mean(jnp.square(logits - 1)), {"largest": jnp.max(logits)}

    monkeypatch.setitem(OBJECTIVES, "calm", calm)
    config = tiny_config()
    config.objective = dict(name="calm", strength=3.0)
    _, _, metrics = steps_of(config)
    assert metrics["loss"] == pytest.approx(3.0)  # the head starts with zeros
    assert metrics["largest"] == 0.0
    assert "top1" not in metrics
    for section, message in (
        (dict(name="calm", strenght=3.0), r"unknown key objective\.strenght: did you mean objective\.strength"),
        (dict(name="noise"), r"objective\.name='noise' is unknown: expected one of classification, calm"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(tiny_config().to_dict() | {"objective": section})


def test_the_keywords_of_an_evaluation_are_keys_of_its_section(monkeypatch):
    class Neighbours:
        figures, several_labels, details = ("neighbours",), False, {}

        def __init__(self, *, num_classes, k: int, **_):
            self.given = num_classes, k

        def run(self, state):
            return {}

    monkeypatch.setitem(job_module.EVALS, "neighbours", Neighbours)
    config = tiny_config()
    config.evals = dict(
        near=dict(type="neighbours", k=3, every_steps=5), far=dict(type="neighbours", k=9, every_secs=1)
    )
    config.checkpoint.best_metric = None
    made = build(config).evaluations(StopSignal())
    assert {name: evaluation.given for name, evaluation in made.items()} == {"near": (10, 3), "far": (10, 9)}


def test_accumulated_equals_one_large_batch():
    config = quiet(optim__clip_norm=0.0)
    config.optim.update(dict(name="sgd", lr=0.5))
    first, whole, one = steps_of(config)
    config.run.accumulate_steps = 4
    _, parts, four = steps_of(config)
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (first.params, whole.params)))]
    apart = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (parts.params, whole.params)))]
    assert max(moved) > 1e-3
    assert max(apart) < 1e-6
    assert float(four["loss"]) == pytest.approx(float(one["loss"]), rel=1e-6)
    assert float(four["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-5)


def test_clipping_limits_the_update():
    config = quiet()
    config.optim.update(dict(name="sgd", lr=1.0, weight_decay=0.0, clip_norm=0.01, momentum=0.0))
    _, _, clipped = steps_of(config)
    assert float(clipped["grad_norm"]) > 0.02
    assert float(clipped["update_norm"]) == pytest.approx(0.01, rel=1e-4)
    config.optim.clip_norm = 0.0
    _, _, free = steps_of(config)
    assert float(free["update_norm"]) == pytest.approx(float(free["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize(("warmup", "kept"), [(True, 0.1), (False, 0.9)])
def test_average_with_and_without_warmup(warmup, kept):
    first, after, _ = steps_of(quiet(run__ema_decay=0.9, run__ema_warmup=warmup))
    expected = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, first.params, after.params)
    for got, want in zip(*map(jax.tree.leaves, (after.ema, expected))):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_norms_per_layer_add_up(scan):
    _, _, metrics = steps_of(quiet(run__log_layer_norms=True, model__scan=scan))
    for name in ("grad_norm", "update_norm"):
        parts = {k: float(v) for k, v in metrics.items() if k.startswith(f"{name}/")}
        assert parts.keys() >= {f"{name}/{part}" for part in ("block_0", "block_1", "head", "patch_embed")}
        assert np.sqrt(sum(v**2 for v in parts.values())) == pytest.approx(float(metrics[name]), rel=1e-5)
    _, _, off = steps_of(quiet())
    assert not any("/" in name for name in off)


def test_learning_rates_are_those_of_the_optimiser():
    config = quiet()
    config.optim.update(dict(name="sgd", lr=1.0, weight_decay=0.0, clip_norm=0.0, momentum=0.0, warmup_steps=2))
    rates = build(config).learning_rates()
    assert len(rates) == 10
    assert rates[:3].tolist() == [0.0, 0.5, 1.0]
    _, _, metrics = steps_of(config, count=2)
    assert float(metrics["update_norm"]) == pytest.approx(0.5 * float(metrics["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "at_zero", "confidence"),
    [
        (dict(name="softmax_xent", label_smoothing=0.3), math.log(10), 0.1),
        (dict(name="sigmoid_xent", label_smoothing=0.3, threshold=0.2, reduction="sum"), 10 * math.log(2), 0.5),
        (dict(name="sigmoid_xent", reduction="mean"), math.log(2), 0.5),
    ],
)
def test_evaluations_judge_by_the_loss_of_the_run(loss, at_zero, confidence):
    config = quiet()
    config.loss = loss
    job = build(config)
    state = jax.jit(job.init)()
    head = jax.tree.map(jnp.zeros_like, state.params["head"])  # all logits 0
    evaluation = job.evaluations(StopSignal())["test"]
    figures = evaluation.run(state.replace(params={**state.params, "head": head}))
    assert figures["loss"] == pytest.approx(at_zero, rel=1e-5)
    assert figures["ece"] == pytest.approx(abs(figures["top1"] - confidence), rel=1e-5)
    np.testing.assert_allclose([s["probabilities"] for s in evaluation.details["samples"]], confidence, rtol=1e-5)


def schedule_free():
    config = quiet(run__total_steps=4, run__log_every_steps=2)
    config.optim = dict(name="schedule_free", lr=0.05, weight_decay=0.0, schedule="constant")
    config.evals.test.every_steps = 0
    return config


def test_an_evaluation_has_a_split_of_its_own(tmp_path):
    config = quiet(run__total_steps=2, run__log_every_steps=2)
    config.data.eval_split = "test[:40]"
    config.evals = dict(
        test=dict(type="classification", every_steps=0),
        seen=dict(type="classification", every_steps=0, split="train[5:25]"),
        again=dict(type="classification", every_steps=0, split="test[:40]"),
    )
    _, found = train(config, tmp_path)
    assert (found["test/count"], found["seen/count"]) == (40, 20)
    for figure in ("loss", "top1", "count"):
        assert found[f"again/{figure}"] == found[f"test/{figure}"]
    alone = quiet(run__total_steps=2, run__log_every_steps=2)
    alone.data.eval_split = "train[5:25]"
    assert train(alone, tmp_path / "alone")[1]["test/loss"] == found["seen/loss"] != found["test/loss"]
    samples = json.loads((tmp_path / "evals" / "seen.json").read_text())["samples"]
    assert samples
    source = build(alone).data.eval_source
    assert all(sample["id"] == str(source[sample["row"]]["id"]) for sample in samples)


def test_evaluations_of_one_split_share_it():
    config = quiet()
    config.evals.update({name: dict(type="classification", every_steps=1) for name in ("a", "b")})
    config.evals.b.split, config.evals.a.split = config.data.eval_split, "train[:7]"
    job = build(config)
    assert job.evaluated["test"] is job.evaluated["b"] is job.data
    assert len(job.evaluated["a"].eval_source) == 7


def test_pictures_of_another_split_that_the_model_does_not_take_are_refused(tmp_path):
    labels = np.arange(10)
    pictures = {
        f"{split}_images": np.zeros((10, side, side, 1), np.uint8) for split, side in (("train", 8), ("val", 8))
    }
    pictures["large_images"] = np.zeros((10, 12, 12, 1), np.uint8)
    np.savez(tmp_path / "a.npz", **pictures, train_labels=labels, val_labels=labels, large_labels=labels)
    config = quiet(model__posemb="learned")
    config.data.source = dict(name="arrays", path=str(tmp_path / "a.npz"))
    config.data.update(dict(train_split="train", eval_split="val", batch_size=8, eval_batch_size=8))
    build(config)
    config.evals.test.split = "large"
    with pytest.raises(ConfigError, match=r"\(12, 12, 1\)"):
        build(config)


@pytest.mark.parametrize(("split", "message"), [("nowhere", "evals.test: "), (3, "evals.test.split=3")])
def test_a_split_that_is_not_there_is_named(split, message):
    config = quiet()
    config.evals.test.split = split
    with pytest.raises(ConfigError, match=message):
        build(config)


@pytest.mark.parametrize("steps_per_epoch", [22.47, 1437 / 64, 7.0, 0.3, 1e-3, 1 / 3])
@pytest.mark.parametrize(("every", "parts"), [(1.0, 5), (22.0, 5), (0.5, 3), (10.0, 30)])
def test_what_is_due_at_the_end_is_not_due_just_before_it(every, parts, steps_per_epoch):
    total = in_steps("run", {"total_epochs": every * parts}, steps_per_epoch)["total_steps"]
    distance = in_steps("checkpoint", {"every_epochs": every}, steps_per_epoch)["every_steps"]
    assert distance == max(1, math.ceil(round(every * steps_per_epoch, 3)))
    assert math.ceil(total / distance) <= parts


@pytest.mark.parametrize("steps_per_epoch", [1251.14, 22.1, 22.47, 0.3])
def test_what_is_kept_is_among_what_is_saved(steps_per_epoch):
    steps = in_steps("checkpoint", {"keep_every_epochs": 3.0, "every_epochs": 1.0}, steps_per_epoch)
    assert steps["keep_every_steps"] == 3 * steps["every_steps"]


@pytest.mark.parametrize("frozen", [(), ("patch_embed/.*", "blocks/norm1/.*")])
def test_schedule_free_is_evaluated_and_loaded_at_its_average(frozen, tmp_path):
    config = schedule_free()
    config.optim.freeze = frozen
    config.run.ema_decay = 0.5
    state, results = train(config, tmp_path)
    job = build(config)
    found = {}
    with job.writer(None, start_step=0) as writer:
        (hook,) = job.evaluation_hooks(job.evaluations(StopSignal()), writer, None, found).values()
        hook(4, state.replace(opt_state=None))
        at_parameters = found["test/loss"]
        hook(4, state.replace(opt_state=None, params=eval_params(state.opt_state, state.params)))
    assert results["test/loss"] == pytest.approx(found["test/loss"], rel=1e-6)
    assert results["test/loss"] != pytest.approx(at_parameters, rel=1e-3)
    assert evaluate(config, tmp_path)["test/loss"] == results["test/loss"]
    assert evaluate(config, tmp_path)["test/ema_loss"] == results["test/ema_loss"]
    average = eval_params(state.opt_state, state.params)
    for name, weights in {str(tmp_path): average, f"{tmp_path}:ema": state.ema}.items():
        jax.tree.map(np.testing.assert_array_equal, load_pretrained(name).params, jax.device_get(weights))


class Killed(Exception):
    pass


def test_metrics_and_tables_of_a_resumed_run(tmp_path, monkeypatch):
    """Intervals of 3 and checkpoints every 4 steps: the run is cut in the middle of both."""
    config = tiny_config(run__log_every_steps=3, run__log_layer_norms=True)
    train(config, tmp_path / "whole")
    real = train_log.TrainLog.__call__

    def cut(self, step, *rest):
        real(self, step, *rest)
        if step == 7:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(train_log.TrainLog, "__call__", cut)
        patched.setattr(Checkpoints, "save", keep_until(5, Checkpoints.save))
        with pytest.raises(Killed):
            train(config, tmp_path / "cut")
    lines = metrics_lines(tmp_path / "cut")
    assert json.loads(lines[-1])["step"] == 6
    train(config, tmp_path / "cut")
    assert metrics_lines(tmp_path / "cut") == metrics_lines(tmp_path / "whole")
    assert csv_rows(tmp_path / "cut", "test") == csv_rows(tmp_path / "whole", "test")
    rows = csv_rows(tmp_path / "cut", "train")
    assert rows == csv_rows(tmp_path / "whole", "train")
    assert [row["step"] for row in rows] == ["3", "6", "9", "10"]
    assert {"loss", "lr", "grad_norm/block_1"} <= rows[0].keys()


def keep_until(last, save):
    """A kill leaves no checkpoint of its own step behind; an exception, which stands in for it here, would."""

    def kept(self, step, *arguments, **named):
        return step <= last and save(self, step, *arguments, **named)

    return kept


@pytest.mark.parametrize("accumulate_steps", [1, 4])
def test_the_picture_of_the_first_batch_is_what_the_first_step_gets(tmp_path, monkeypatch, accumulate_steps):
    config = tiny_config(augment__mixup_alpha=0.4, run__accumulate_steps=accumulate_steps, run__data_seed=5)
    del config.augment["affine"]  # it takes long to compile
    job = build(config, devices=jax.devices()[:1])
    seen, drawn = [], []

    def objective(params, batch, key, hparams):
        change = bind(augment, "augment", job.sections["augment"])
        seen.append(
            change(jax.random.split(key)[0], batch["image"], jax.nn.one_hot(batch["label"], 10), hparams=hparams)
        )
        return jnp.zeros(()), {}

    batch = next(job.train_batches(0))
    key = jax.random.fold_in(job.init().key, 0)
    parts = {name: array[::accumulate_steps] for name, array in batch.items()}
    objective({}, parts, key if accumulate_steps == 1 else jax.random.fold_in(key, 0), job.init().hparams)

    def grid(images, captions):
        drawn.extend([images, captions])
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(job_module.pictures, "grid", grid)
    with job.writer(tmp_path, start_step=0, quiet=True) as writer:
        job.draw(batch, writer)
    images, targets = seen[0]
    expected = np.clip(255 * (np.asarray(images[:24]) * 0.5 + 0.5), 0, 255)
    assert abs(drawn[0].astype(float) - expected).max() <= 1.0
    captions = [job_module.pictures.caption(row, job.data.class_names) for row in np.asarray(targets[:24])]
    assert drawn[1] == captions
    assert ((targets > 0) & (targets < 1)).any()  # mixup is on


def test_a_run_leaves_report_pictures_facts_and_trace(tmp_path):
    config = tiny_config(run__profile_steps=(2, 3), run__peak_tflops=1e-3, run__total_steps=4)
    config.checkpoint = dict(every_secs=1e6)
    config.evals = dict(test=dict(type="classification", every_secs=1e6))
    _, results = train(config, tmp_path)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["peak_flops"] == 1e9
    assert facts["num_params"] == sum(x.size for x in jax.tree.leaves(build(config).abstract_state().params))
    rate = results["train/images_per_sec"] * facts["train_flops_per_image"]
    assert results["train/mfu_percent"] == pytest.approx(100 * rate / (1e9 * jax.device_count()))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert (tmp_path / "pictures/train/batch.png").exists()
    assert (tmp_path / "pictures/test/confusion.png").exists()
    details = json.loads((tmp_path / "evals/test.json").read_text())
    assert np.trace(details["confusion"]) == round(results["test/top1"] * 359)
    assert details["samples"][0]["id"]
    page = (tmp_path / "report.html").read_text()
    assert "Finished: step 4 of 4" in page
    assert "from run.peak_tflops" in page


GREY_16 = (dict(op="decode", channels=1), dict(op="resize", size_px=16))
FLIP = (dict(op="decode", channels=1), dict(op="flip"))
CUT = (dict(op="decode", channels=1), dict(op="central_crop", size_px=9))  # of pictures of 8


def test_positions_that_are_computed_take_evaluation_pictures_of_another_size():
    config = tiny_config()
    config.data.eval_transforms = GREY_16
    assert build(config).data.eval_image_shape == (16, 16, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.run.update(dict(peak_tflops="fast")), r"run: peak_tflops='fast': expected 'known', 'measured'"),
        (lambda c: c.run.update(dict(profile_steps=(1, 3))), r"run: profile_steps=\(1, 3\): expected"),
        (lambda c: c.run.update(dict(profile_steps=(3, 11))), "<= 10"),
        (lambda c: c.run.update(dict(log_every_steps=0)), r"run\.log_every_steps=0: expected 1 or more"),
        (lambda c: c.evals.test.update(dict(every_secs=3.0)), r"unknown key evals\.test\.every_steps"),
        (lambda c: c.evals.test.__delitem__("every_steps"), r"missing key evals\.test\.every_steps"),
        (
            lambda c: c.checkpoint.update(dict(every_steps=-4)),
            r"checkpoint\.every_steps=-4: expected a number of 0 or more",
        ),
        (lambda c: c.evals.test.update(dict(type="multilabel")), "one label each: use 'classification'"),
        (lambda c: c.evals.update({"train": c.evals.test}), "not 'train'"),
        (lambda c: c.checkpoint.update(dict(best_metric="test/acc")), r"'test/acc' is none of .*test/top1"),
        (lambda c: c.checkpoint.update(dict(best_metric="test/ema_top1")), "is none of"),
        (lambda c: c.checkpoint.update(dict(best_metric="val/top1")), "is none of"),
        (
            lambda c: (c.model.update(dict(posemb="learned")), c.data.update(dict(eval_transforms=GREY_16))),
            r"data\.eval_transforms make pictures of \(16, 16, 1\).*: expected \(8, 8, 1\)",
        ),
        (lambda c: c.data.update(dict(eval_transforms=())), r"eval_transforms make pictures of \(8, 8, 3\)"),
        (lambda c: c.data.update(dict(eval_transforms=FLIP)), "data: eval_transforms draw random numbers"),
        (
            lambda c: c.data.update(dict(train_transforms=FLIP, decode_once=True)),
            "data: decode_once=True, but train_transforms draw",
        ),
        (
            # as many tokens as pictures in a batch: the loss would broadcast them
            lambda c: (c.model.update(dict(pool="none")), c.data.update(dict(batch_size=16, eval_batch_size=16))),
            r"model\.pool='none' gives logits \(16, 16, 10\): expected one row per picture, \(16, 10\)",
        ),
        (lambda c: c.update(dict(loss=dict(name="sigmoid_xent", reduction="avg"))), "loss: Unknown reduction='avg'"),
        (lambda c: c.data.update(dict(train_transforms=CUT)), "^data: .*central_crop"),
        (lambda c: c.evals.test.update(dict(type="regression")), r"evals\.test\.type='regression' is unknown"),
    ],
)
def test_bad_settings_are_named_before_anything_starts(change, message):
    config = tiny_config()
    with config.unlocked():
        change(config)
    with pytest.raises(ConfigError, match=message):
        build(config)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("mesh", None, "mesh: expected a section with keys, found None"),
        ("sinks", ["csv"], r"sinks: expected a section with keys, found \['csv'\]"),
        ("run", 3, "run: expected a section"),
        ("evals", {"../up": dict(type="classification", every_steps=5)}, r"evals\.\.\./up: the name of an evaluation"),
    ],
)
def test_what_is_no_section_is_named(section, value, message):
    with pytest.raises(ConfigError, match=message):
        build(tiny_config().to_dict() | {section: value})


def test_objective_is_a_mean_of_float32_logits():
    """A loss in bfloat16 would be coarse: the metrics of a bfloat16 model are float32."""
    _, _, metrics = steps_of(tiny_config(model__dtype="bfloat16"))
    assert {v.dtype.name for k, v in metrics.items() if not k.startswith("skipped")} == {"float32"}
