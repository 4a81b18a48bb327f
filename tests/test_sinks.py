"""Files and servers; W&B and MLflow as stand-ins, and themselves where they are installed."""

import csv
import importlib.machinery
import importlib.util
import inspect
import json
import os
import resource
import sys
import types

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_config
from vit_flax import files
from vit_flax.config import ConfigError
from vit_flax.job import build
from vit_flax.sinks import SINKS, Sink
from vit_flax.sinks.files import Csv, Files
from vit_flax.sinks.servers import MLflow, WandB
from vit_flax.sinks.tensorboard import TensorBoard

PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
ROWS = [
    (1, {"train/loss": 2.5, "train/top1": 0.1}),
    (2, {"test/top1": 0.2}),
    (2, {"train/loss": None, "train/top1": 0.3}),
    (3, {"train/loss": 1.5, "train/top1": 0.1 + 0.2}),
]


def write(sink, rows):
    for step, values in rows:
        sink.scalars(step, values)
    sink.close()


def contents(folder):
    return {path.relative_to(folder): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_jsonl_and_pictures(tmp_path):
    sink = Files(workdir=tmp_path, start_step=0)
    sink.picture(1, "test/confusion", np.zeros_like(PICTURE))
    sink.picture(2, "test/confusion", PICTURE)
    write(sink, ROWS)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, **values} for step, values in ROWS]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "pictures/test/confusion.png")), PICTURE)


def test_csv_has_a_table_per_source(tmp_path):
    write(Csv(workdir=tmp_path, start_step=0), ROWS)
    assert (tmp_path / "csv/train.csv").read_text().splitlines() == [
        "step,loss,top1",
        "1,2.5,0.1",
        "2,,0.3",
        "3,1.5,0.30000000000000004",  # every digit
    ]
    assert (tmp_path / "csv/test.csv").read_text().splitlines() == ["step,top1", "2,0.2"]


def test_csv_grows_columns_and_quotes_names(tmp_path):
    write(Csv(workdir=tmp_path, start_step=0), [(1, {"a/x": 1.0}), (2, {'a/odd, "name"': 2.0}), (3, {"a/x": 3.0})])
    with open(tmp_path / "csv/a.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["step", "x", 'odd, "name"'], ["1", "1.0", ""], ["2", "", "2.0"], ["3", "3.0", ""]]


@pytest.mark.parametrize("sink", [Files, Csv])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_resumed_files_equal_the_uninterrupted_ones(sink, start, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(sink(workdir=tmp_path / name, start_step=0), ROWS)
    for path in (tmp_path / "b").rglob("*.*"):
        if path.is_file():
            with open(path, "a") as file:
                file.write('{"step": 2, "half' if path.suffix == ".jsonl" else "3,0.")  # a kill while a line is written
    write(sink(workdir=tmp_path / "b", start_step=start), [row for row in ROWS if row[0] > start])
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


@pytest.mark.parametrize("sink", [Files, Csv])
def test_what_is_said_again_of_the_last_step_is_written_once(sink, tmp_path):
    """A life that evaluated the step it had gone on from, and was killed before the checkpoint said so."""
    for name, again in (("a", []), ("b", ROWS[1:2])):
        (tmp_path / name).mkdir()
        write(sink(workdir=tmp_path / name, start_step=0), ROWS[:3])
        write(sink(workdir=tmp_path / name, start_step=2), [*again, *ROWS[3:]])
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_csv_of_a_column_that_came_after_the_checkpoint(tmp_path):
    rows = [(1, {"a/x": 1.0}), (2, {"a/y": 2.0}), (3, {"a/x": 3.0})]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(Csv(workdir=tmp_path / name, start_step=0), rows)
    write(Csv(workdir=tmp_path / "b", start_step=1), rows[1:])
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_csv_cut_short_in_its_header(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/train.csv").write_text("step,lo")
    write(Csv(workdir=tmp_path, start_step=0), ROWS[:1])
    assert (tmp_path / "csv/train.csv").read_text().splitlines() == ["step,loss,top1", "1,2.5,0.1"]


def events(folder):
    """(kind, tag, step, value) of every event file below a folder, in the order of writing."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(folder.rglob("events.*"), key=os.path.getmtime):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            checksums = [int.from_bytes(data[end : end + 4], "little") for end in (8, 12 + size)]
            assert checksums == [masked_crc32c(data[:8]), masked_crc32c(data[12 : 12 + size])]
            data = data[16 + size :]
            if event.HasField("session_log"):
                found.append(("session", "", event.step, event.session_log.status))
            for value in event.summary.value:
                what = value.WhichOneof("value")
                found.append((what, value.tag, event.step, value.simple_value if what == "simple_value" else value))
    return found


def test_tensorboard_scalars_pictures_and_hyperparameters(tmp_path):
    config = {"optim.lr": 1e-3, "model.pool": "gap", "data.ops": [{"op": "x"}], "optim.clip": None, "run.ema": True}
    sink = TensorBoard(workdir=tmp_path, start_step=0, config=config)
    sink.picture(1, "train/batch", PICTURE)
    sink.scalars(3, {"train/loss": 2.5, "train/top1": None})
    sink.finish({"test/top1": 0.5})
    sink.close()
    found = events(tmp_path / "tensorboard")
    assert ("simple_value", "train/loss", 3, 2.5) in found
    assert "train/top1" not in [tag for _, tag, _, _ in found]
    (picture,) = [value.image for kind, tag, step, value in found if (kind, tag, step) == ("image", "train/batch", 1)]
    assert (picture.height, picture.width) == (4, 5)
    assert ("simple_value", "final/test/top1", 0.5) in [(kind, tag, value) for kind, tag, _, value in found]
    assert any("hparams" in tag for _, tag, _, _ in found)


def test_a_full_disk_is_an_error_of_tensorboard_and_no_endless_wait(tmp_path):
    sink = TensorBoard(workdir=tmp_path, start_step=0, config={})
    sink.scalars(1, {"train/loss": 2.5})
    assert events(tmp_path / "tensorboard")[-1] == ("simple_value", "train/loss", 1, 2.5)  # there at once
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(sink, [(step, {"train/loss": 2.5}) for step in range(2, 50)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sink.close()


def test_tensorboard_forgets_what_the_earlier_life_wrote_beyond_the_checkpoint(tmp_path):
    for start in (0, 2):
        sink = TensorBoard(workdir=tmp_path, start_step=start, config={})
        write(sink, [row for row in ROWS if row[0] > start])
    sessions = [step for kind, _, step, _ in events(tmp_path / "tensorboard") if kind == "session"]
    assert sessions == [1, 3]  # TensorBoard drops points of that step and later which were written before


class FakeRun:
    def __init__(self, step):
        self.step, self.logged, self.summary, self.finished = step, [], {}, False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.inits, module.next_step = [], 0
    module.Image = lambda image: ("image", image.shape)

    def init(**arguments):
        module.inits.append(arguments)
        module.run = FakeRun(module.next_step)
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_in_the_same_run_and_repeats_nothing(wandb, tmp_path):
    sink = WandB(workdir=tmp_path, config={"optim.lr": 0.1, "a": (1, 2)}, project="p", tags=("x",), mode="offline")
    write(sink, ROWS)
    sink.picture(3, "test/confusion", PICTURE)
    sink.finish({"test/top1": 0.5})
    (init,) = wandb.inits
    assert init["id"]
    assert (init["resume"], init["project"], init["mode"]) == ("allow", "p", "offline")
    assert (init["name"], init["config"]) == (tmp_path.name, {"optim.lr": 0.1, "a": [1, 2]})
    assert wandb.run.logged == [
        (1, {"train/loss": 2.5, "train/top1": 0.1}),
        (2, {"test/top1": 0.2}),
        (2, {"train/top1": 0.3}),
        (3, {"train/loss": 1.5, "train/top1": 0.1 + 0.2}),
        (3, {"test/confusion": ("image", (4, 5, 3))}),
    ]
    assert wandb.run.summary == {"test/top1": 0.5}
    assert wandb.run.finished
    wandb.next_step = 3
    write(WandB(workdir=tmp_path, config={}, project="p"), ROWS)
    assert wandb.inits[1]["id"] == init["id"]
    assert [step for step, _ in wandb.run.logged] == [3]


@pytest.fixture
def mlflow(monkeypatch):
    module = types.ModuleType("mlflow")
    module.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
    calls = module.calls = []

    def record(name):
        def call(*positional, **named):
            calls.append((name, *positional, *sorted(named.items())))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run0"))

        return call

    for name in ["set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "log_image"]:
        setattr(module, name, record(name))
    module.flush_async_logging, module.end_run = record("flush_async_logging"), record("end_run")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_mlflow_goes_on_in_the_same_run(mlflow, tmp_path):
    config = {f"key{i}": i for i in range(150)}
    sink = MLflow(workdir=tmp_path, config=config, experiment="e", tracking_uri="sqlite:///x.db")
    sink.picture(3, "test/confusion", PICTURE)
    write(sink, ROWS[:2])
    names = [call[0] for call in mlflow.calls]
    assert names[:3] == ["set_tracking_uri", "set_experiment", "start_run"]
    params = [call[1] for call in mlflow.calls if call[0] == "log_params"]
    assert {key: value for part in params for key, value in part.items()} == config
    assert max(map(len, params)) == 100
    assert ("log_metrics", {"train/loss": 2.5, "train/top1": 0.1}, ("step", 1), ("synchronous", False)) in mlflow.calls
    (picture,) = [call for call in mlflow.calls if call[0] == "log_image"]
    assert picture[2:] == (("artifact_file", "pictures/test/confusion_3.png"),)
    assert names[-2:] == ["flush_async_logging", "end_run"]
    mlflow.calls.clear()
    MLflow(workdir=tmp_path, config={"other": 1}, experiment="e")
    assert ("start_run", ("run_id", "run0")) in mlflow.calls
    assert {call[0] for call in mlflow.calls} == {"set_experiment", "start_run"}  # no parameters twice, no address


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_kill_while_the_name_of_the_run_is_written_leaves_no_half_of_it(name, wandb, mlflow, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        SINKS[name](workdir=tmp_path, config={}, **(dict(project="p") if name == "wandb" else dict(experiment="e")))
    assert not (tmp_path / f"{name}_run_id").exists()


def test_all_sinks_have_the_interface(wandb, mlflow, tmp_path):
    arguments = dict(workdir=tmp_path, start_step=0, config={}, project="p", experiment="e")
    for sink in SINKS.values():
        takes = inspect.signature(sink).parameters
        made = sink(**{k: v for k, v in arguments.items() if k in takes})
        assert isinstance(made, Sink)
        made.close()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_not_installed_is_said_with_the_command_before_anything_starts(name, monkeypatch, tmp_path):
    config = tiny_config()
    config.sinks = {name: dict(project="p") if name == "wandb" else dict(experiment="e")}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))
    with pytest.raises(ConfigError, match=rf"sinks\.{name}: .* pip install 'vit_flax\[{name}\]'"):
        build(config)


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (dict(tensorbord={}), r"unknown key sinks\.tensorbord: did you mean sinks\.tensorboard\?"),
        (dict(wandb=dict(project="p", projct="q")), r"unknown key sinks\.wandb\.projct"),
        (dict(wandb={}), r"missing key sinks\.wandb\.project"),
        (dict(csv=dict(workdir="x")), r"unknown key sinks\.csv\.workdir"),
    ],
)
def test_bad_sinks_are_named(sinks, message, wandb):
    config = tiny_config()
    config.sinks = sinks
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_config_chooses_the_sinks(wandb, tmp_path):
    config = tiny_config()
    config.sinks = dict(wandb=dict(project="p", group="g"))
    with build(config).writer(tmp_path, start_step=0) as writer:
        writer.write(1, {"train/loss": 1.0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "wandb_run_id"]
    assert wandb.inits[0]["config"]["model.width"] == 8
    del config["sinks"]
    (tmp_path / "default").mkdir()
    with build(config).writer(tmp_path / "default", start_step=0) as writer:
        writer.write(1, {"train/loss": 1.0})
    assert sorted(p.name for p in (tmp_path / "default").iterdir()) == ["csv", "metrics.jsonl", "tensorboard"]


def test_real_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    for start in (0, 2):
        sink = WandB(workdir=tmp_path, config={"a": 1}, project="p", mode="offline")
        sink.picture(start + 1, "train/batch", PICTURE)
        sink.finish({"test/top1": 0.5})
        write(sink, [row for row in ROWS if row[0] > start])
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.filterwarnings("default")  # MLflow's own libraries warn about each other
def test_real_mlflow_in_a_database(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for start in (0, 2):
        sink = MLflow(workdir=tmp_path, config={"a": 1, "b": None}, experiment="e", tracking_uri=uri)
        sink.picture(start + 1, "train/batch", PICTURE)
        write(sink, [row for row in ROWS if row[0] > start])
    (run,) = mlflow.search_runs(experiment_names=["e"], output_format="list")
    assert run.data.params == {"a": "1", "b": "None"}
    assert run.data.metrics == {"train/loss": 1.5, "train/top1": 0.1 + 0.2, "test/top1": 0.2}
