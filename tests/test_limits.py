"""That values outside their limits are refused, by name, and those at the limits are not."""

import jaxtyping
import pytest

from tests.helpers import tiny_config
from vit_flax.config import ConfigError
from vit_flax.job import build
from vit_flax.limits import LIMITS, outside
from vit_flax.sections import SECTIONS
from vit_flax.update_rules import RULES


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("optim.lr", [-1e-3, float("nan"), float("inf"), True, "1e-3"]),
        ("optim.weight_decay", [-0.1]),
        ("optim.b2", [1.0, -0.1]),
        ("optim.layer_decay", [0.0, 1.5]),
        ("optim.clip_norm", [-1.0]),
        ("optim.mu_dtype", ["int8", "bf16"]),
        ("run.total_steps", [0, -3, 10**12]),
        ("run.ema_decay", [1.0, 1.5, -0.1]),
        ("run.accumulate_steps", [0, -2]),
        ("run.max_skipped_steps", [0]),
        ("run.seed", [-1, 2**32]),
        ("data.batch_size", [0, -64]),
        ("data.eval_batch_size", [0]),
        ("data.num_threads", [0]),
        ("data.decode_once", ["maybe", 1]),
        ("data.on_error", ["ignore"]),
        ("model.representation_size", [0]),
        ("model.dtype", ["int32"]),
        ("loss.label_smoothing", [1.5, -0.1, 1.0]),
        ("augment.mixup_alpha", [-1.0, "0.2"]),
        ("augment.erase_prob", [2.0]),
        ("augment.affine", [dict(scale_percent=200.0), dict(zoom=1.0)]),
        ("augment.std", [(0.0,), (0.5, 0.5)]),
        ("checkpoint.keep_last", [0]),
        ("checkpoint.keep_every_steps", [0, -1]),
        ("checkpoint.best_mode", ["highest"]),
        ("checkpoint.on_error", ["ignore"]),
    ],
)
def test_nonsense_is_an_error_that_names_the_key(key, bad, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a user's program
    section, name = key.split(".")
    for value in bad:
        config = tiny_config()
        with config.unlocked():
            config[section] = {**config[section].to_dict(), name: value}
        with pytest.raises(ConfigError) as error:
            build(config)
        assert key in str(error.value) or str(error.value).startswith(f"{section}: "), error.value


def test_numbers_of_epochs_are_checked_before_they_become_steps():
    for value in (-1.0, float("nan"), float("inf"), "ten"):
        config = tiny_config()
        with config.unlocked():
            del config.optim["warmup_steps"]
            config.optim.warmup_epochs = value
        with pytest.raises(ConfigError, match=r"optim\.warmup_epochs=.*: expected a number of 0 or more, in epochs"):
            build(config)


def test_a_number_is_no_array_and_no_text():
    config = tiny_config()
    config.loss = dict(name="softmax_xent", label_smoothing="0.1")
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing: expected a number, found '0\.1' \(str\)"):
        build(config)


def test_limits_are_for_keys_that_there_are():
    """A limit whose key was renamed would guard nothing."""
    import inspect

    for name in LIMITS:
        section, key = name.split(".", 1)
        schema = SECTIONS[section][0]
        callables = list(schema.values()) if isinstance(schema, dict) else [schema]
        callables += RULES.values() if section == "optim" else []
        if section == "model":
            from vit_flax.models import ViT

            callables.append(ViT)
        if key.startswith("affine."):
            from vit_flax.augment import random_affine

            callables, key = [random_affine], key.removeprefix("affine.")
        takes = {parameter for function in callables for parameter in inspect.signature(function).parameters}
        assert key in takes | {"every_steps", "every_secs"}, name


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("optim", "lr", 0), ("optim", "clip_norm", None), ("optim", "layer_decay", 1.0), ("evals.test", "every_steps", 0)],
)
def test_values_at_the_limits_are_fine(section, key, value):
    assert outside(section, key, value) is None
