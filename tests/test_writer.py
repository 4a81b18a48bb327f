import logging
import os
import re

import pytest

from tests.test_train_log import Collected
from vit_flax import writer as writer_module
from vit_flax.log_lines import show_warnings
from vit_flax.writer import Writer, print_results


def make(sinks):
    return Writer(None, {name: (lambda sink=sink: sink) for name, sink in sinks.items()}, start_step=0, total_steps=9)


def test_every_sink_gets_everything(tmp_path):
    a, b = Collected(), Collected()
    with make({"a": a, "b": b}) as writer:
        writer.write(3, {"x": 1.0, "y": float("nan"), "z": float("inf")})
        writer.finish({"x": 1.0, "y": float("nan")})
    assert a.lines == b.lines == [{"step": 3, "x": 1.0, "y": None, "z": None}, {"x": 1.0}, "closed"]


class Broken(Collected):
    def scalars(self, step, values):
        raise ConnectionError("the server is away")

    def close(self):
        raise ConnectionError("still away")


def test_a_server_that_fails_does_not_end_the_run(capsys):
    files, server = Collected(), Broken()
    with make({"mlflow": server, "files": files}) as writer:
        writer.write(1, {"x": 1.0})
        writer.write(2, {"x": 2.0})
    assert [line["step"] for line in files.lines[:-1]] == [1, 2]
    said = capsys.readouterr().out
    assert said.count("mlflow failed and gets nothing more from this run (ConnectionError: the server is away).") == 1


def test_a_file_that_fails_does_and_names_the_workdir(tmp_path):
    class Full(Collected):
        def scalars(self, step, values):
            raise OSError(28, "No space left on device")

    writer = Writer(tmp_path, {"csv": Full}, start_step=0, total_steps=9)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"):
        writer.write(1, {"x": 1.0})


def test_sinks_are_closed_when_another_cannot_be_opened():
    opened = Collected()

    def fail():
        raise OSError("no such server")

    with pytest.raises(OSError, match="no such server"):
        Writer(None, {"a": lambda: opened, "b": fail}, start_step=0, total_steps=1)
    assert opened.lines == ["closed"]


def test_only_the_first_process_writes(monkeypatch, capsys):
    monkeypatch.setattr(writer_module.jax, "process_index", lambda: 1)
    sink = Collected()
    with make({"a": sink}) as writer:
        writer.write(1, {"x": 1.0})
        writer.say("hello")
        writer.progress(1, "there")
    assert sink.lines == []
    assert capsys.readouterr().out == ""


def test_plain_console_gets_a_line_per_message(capsys):
    with make({}) as writer:
        writer.progress(4, "loss 1 [bold]not markup[/bold]")
        writer.say("x" * 300)
    assert capsys.readouterr().out.splitlines() == ["step 4/9 loss 1 [bold]not markup[/bold]", "x" * 300]


def test_a_run_whose_output_nobody_reads_any_more_goes_on(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as file:
        monkeypatch.setattr("sys.stdout", file)
        writer = make({})
        for step in range(3):
            writer.progress(step, "loss 1.0")
        print_results(writer.console, {"test/top1": 0.5}, {})


def test_warnings_are_lines_above_the_progress_bar(monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    show_warnings()
    logging.getLogger("absl").warning("before, %d", 1)
    with make({}):
        logging.getLogger("absl").warning("during")
        logging.getLogger("absl").info("not shown")
    captured = capsys.readouterr()
    assert captured.err == "warning: before, 1\n"
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.out).replace("\r", "\n").splitlines()
    assert lines.count("warning: during") == 1
    assert "not shown" not in captured.out


def test_results_leave_out_layers_and_places_that_are_not_there(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    with make({}) as writer:
        results = {
            "step": 3.0,
            "test/top1": 0.5,
            "test/ema_count": 359.0,
            "train/grad_norm/block_0": 1.0,
            "train/lr": 1e-5,
            "train/rate": 12345.0,
        }
        print_results(writer.console, results, {"a": tmp_path / "there", "b": tmp_path / "gone"})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["step", "3"],
        ["test/top1", "0.5000"],
        ["test/ema_count", "359"],
        ["train/lr", "1e-05"],
        ["train/rate", "1.234e+04"],
        ["a", str(tmp_path / "there")],
    ]
