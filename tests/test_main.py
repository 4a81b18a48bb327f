"""The command line, as a user meets it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def launch(*arguments, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "vit_flax.main", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
    )


def test_train_resume_and_evaluate(tmp_path):
    arguments = ("--config", "tests/configs/tiny.py", "--workdir", tmp_path)
    first = launch(*arguments)
    assert first.returncode == 0, first.stderr
    assert "step 10/10 loss" in first.stdout
    assert "test/top1" in first.stdout
    assert re.search(r"head/kernel +80 +1 +0\.05\n", first.stdout)  # the table of parameter groups
    assert str(tmp_path / "checkpoints") in first.stdout
    again = launch(*arguments, "--mode=eval")
    assert again.returncode == 0, again.stderr
    rows = [line.split() for line in first.stdout.splitlines() if line.startswith("test/")]
    assert len(rows) == 5
    assert all(row in [line.split() for line in again.stdout.splitlines()] for row in rows)


def test_dry_run_prints_everything_and_writes_nothing(tmp_path):
    test = {"type": "classification", "every_steps": 5}
    evals = f"--config.evals={dict(test=test, seen=test | {'split': 'train[:100]'})}"
    done = launch("--config", "tests/configs/tiny.py", "--mode=dry_run", "--workdir", tmp_path / "new", evals)
    assert done.returncode == 0, done.stderr
    assert re.search(r"blocks/.*kernel +0-1 +[\d,]+ +1 +0\.05\n", done.stdout)  # the table of parameter groups
    for word in (
        '"num_classes": 10',
        "blocks/attention/query",
        "GFLOP per image",
        "MiB",
        "10 of 64 images",
        "100, 359 for evaluation; 10 classes",
    ):
        assert word in done.stdout
    assert not (tmp_path / "new").exists()


def test_options_that_the_file_leaves_at_their_defaults_are_flags_too():
    given = ("run.accumulate_steps=2", "checkpoint.best_mode=min", "optim.freeze=['block_0/.*']", "run.log_layer_norms")
    given += ("run.total_epochs=2", "run.data_seed=3", "checkpoint.best_metric=None")
    done = launch("--config", "tests/configs/tiny.py", "--mode=dry_run", *(f"--config.{option}" for option in given))
    assert done.returncode == 0, done.stderr
    for line in ('"accumulate_steps": 2', '"best_mode": "min"', '"block_0/.*"', '"log_layer_norms": true', " frozen"):
        assert line in done.stdout
    for line in ('"total_epochs": 2', '"data_seed": 3', '"best_metric": null'):
        assert line in done.stdout
    assert "total_steps" not in done.stdout  # of the file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optim.learning=1"], "unknown key optim.learning"),
        (["--config.optim.warmup_stepz=1"], "did you mean optim.warmup_steps?"),
        (["--config.sinks.csv={}"], "is given whole, such as --config.sinks="),
        (["--config.optim.lr=-1"], "optim.lr=-1.0: expected a number of 0 or more"),
        (["--config.modle.width=3"], "the config has no key 'modle.width'. Did you mean model.width?"),
        (["--config.model.width=wide"], "--config.model.width=wide: expected a whole number, as in the file, or None"),
        (["--config.lr=1"], "unknown key lr: did you mean optim.lr?"),
        (["--config.model.variant=S/16"], "model: variant='S/16' changes nothing, because width, depth"),
        (["--epochs=3"], "is changed by --config.SECTION.KEY=VALUE"),
        (["--config.model.num_classes=3"], "model.num_classes=3, but the data has 10 classes"),
        (["--mode=test"], "value should be one of <train|eval|dry_run>"),
        (["run"], "unexpected argument 'run': options start with --config, --workdir or --mode, and the argument of"),
        (["--mode=eval"], "There is no checkpoint below"),
    ],
)
def test_mistakes_get_one_screen_and_no_traceback(arguments, message, tmp_path):
    done = launch("--config", "tests/configs/tiny.py", "--workdir", tmp_path / "new", *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 30
    assert not (tmp_path / "new").exists()


def test_a_config_that_is_not_there():
    done = launch("--config", "configs/nope.py", "--workdir", "x")
    assert done.returncode == 1
    assert "there is no config file configs/nope.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_threads_of_a_failed_save_do_not_hold_up_the_end():
    """Orbax leaves some, now and then, when the disk is full; they would wait for ten minutes."""
    program = (
        "import sys, threading, time; from absl import app; from vit_flax import main as launcher\n"
        "class Left(threading.Thread): __module__ = 'orbax.checkpoint'\n"
        "def run(config):\n    Left(target=time.sleep, args=(100,)).start()\n    raise OSError('disk full')\n"
        "launcher._run = run\n"
        "sys.argv += ['--config', 'tests/configs/tiny.py', '--workdir', 'unused']\n"
        "app.run(launcher.main, flags_parser=launcher.parse_flags)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert (done.returncode, "error: disk full" in done.stderr) == (2, True)
