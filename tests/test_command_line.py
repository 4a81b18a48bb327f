"""Config files and the keys that flags change in them."""

import inspect
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from vit_flax.command_line import given_config, parse_flags
from vit_flax.config import ConfigError, plain

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections

FILE = """
from ml_collections import ConfigDict
def get_config():
    config = ConfigDict(dict(seed=0, data_seed=None, mean=(0.5,), ops=[dict(op="flip")], best="top1", log=True))
    config.run = dict(total_epochs=3.0, warmup_steps=5)
    config.evals = dict(test=dict(every_epochs=1.0), other=dict(every_epochs=1.0))
    return config
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Writes a config file and returns the config that it and the flags give."""

    def parse(text, *arguments):
        (tmp_path / "config.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        argv, values = ["main", *arguments], flags.FlagValues()
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the file of the test before
        options = dict(flag_values=values, lock_config=False, accept_new_attributes=True)
        config_flags.DEFINE_config_file("config", None, "", **options)
        parse_flags(argv)
        return given_config()

    return parse


@pytest.mark.parametrize(
    ("given_values", "config"),
    [
        ([], {}),
        (["seed=None"], {"seed": None}),
        (["data_seed=3"], {"data_seed": 3}),
        (["data_seed=None"], {}),
        (["mean=None"], {"mean": None}),
        (["mean=(0.1,0.2)"], {"mean": (0.1, 0.2)}),
        (["best=None"], {"best": None}),
        (["best=loss"], {"best": "loss"}),
        (["log=None"], {"log": None}),
        (["log=false"], {"log": False}),
        (["ops=[]"], {"ops": []}),
        (["ops=None"], {"ops": None}),
        (["run={'seed': 1}"], {"run": {"seed": 1}}),
        (["run.total_steps=9"], {"run": {"total_steps": 9, "warmup_steps": 5}}),
        (["run.warmup_epochs=1", "run.total_epochs=2"], {"run": {"total_epochs": 2.0, "warmup_epochs": 1}}),
        (
            ["run.total_steps=9", "run.total_epochs=2"],
            {"run": {"total_steps": 9, "total_epochs": 2, "warmup_steps": 5}},
        ),
        (["evals.test.every_secs=9"], {"evals": {"test": {"every_secs": 9}, "other": {"every_epochs": 1}}}),
    ],
)
def test_what_flags_change(given, given_values, config):
    """Durations in two units stay only where both are flags: `build` refuses them."""
    unchanged = given(FILE, "--config", "config.py")
    assert given(FILE, "--config=config.py", *(f"--config.{value}" for value in given_values)) == unchanged | config


@pytest.mark.parametrize("flag", [[], ["--config.run.seed=1"]])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return {}['x']", "config.py, line 2, raises\nKeyError: 'x'"),
        ("def get_config():\n    return 1 + ''", "config.py, line 2, raises\nTypeError: unsupported operand"),
        ("def get_config():\n    return 1 / 0", "config.py, line 2, raises\nZeroDivisionError"),
        ("def get_config():\n    return open('no')", "config.py, line 2, raises\nFileNotFoundError"),
        ("import no_such_package", "config.py, line 1, raises\nModuleNotFoundError"),
        ("\ndef get_config(", "config.py, line 2, raises\nSyntaxError"),
        ("def get_config(): pass", "get_config() of config.py returned None: expected a ConfigDict"),
        ("def get_config(name): pass", "TypeError: get_config() missing 1 required positional argument: 'name'"),
        ("config = {}", "config.py has no get_config()"),
    ],
)
def test_config_files_that_are_wrong(given, capsys, text, message, flag):
    with pytest.raises(SystemExit) as end:
        given(text, "--config", "config.py", *flag)
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("seed=one", "a whole number"),
        ("seed=1.5", "a whole number"),
        ("run.total_epochs=all", "a number"),
        ("log=often", "true or false"),
        ("mean=1 2", "values with commas between them"),
        ("ops=flip", "a list"),
        ("run=fast", "a section"),
    ],
)
def test_values_of_another_type(given, capsys, value, expected):
    with pytest.raises(SystemExit):
        given(FILE, "--config", "config.py", f"--config.{value}")
    assert f"flag --config.{value}: expected {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--config.seed=1"], ["--config="]])
def test_keys_without_a_file(given, capsys, arguments):
    with pytest.raises(SystemExit):
        given(FILE, *arguments)
    assert "--config FILE.py, or FILE.py:ARGUMENT, is needed" in capsys.readouterr().err


def test_a_config_that_raises_is_run_once(given, tmp_path):
    """What it does besides, such as writing a file, is not done again to explain the error."""
    text = "def get_config():\n    with open('ran', 'a') as file: file.write('x')\n    raise KeyError('x')"
    with pytest.raises(SystemExit):
        given(text, "--config", "config.py", "--config.seed=1")
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.parametrize("config", ["configs/digits.py", Path("configs/digits.py")])
def test_name_of_a_config_file_is_no_config(config):
    with pytest.raises(ConfigError, match=r"found .*: vit_flax\.config\.load_config\('configs/digits\.py'\) reads"):
        inspect.unwrap(plain)(config)  # without the check of its annotations, as users run it
