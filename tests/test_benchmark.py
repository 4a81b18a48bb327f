"""The benchmark command: figures add up, cases take turns, five libraries are enough. No test measures time."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import app
from absl.testing import flagsaver

from vit_flax.benchmark import __main__ as command
from vit_flax.benchmark import measure, report
from vit_flax.benchmark.cases import Case, Ours

ROOT = Path(__file__).parent.parent
CASE = Case("mu/16", 2, "train", "float32", image_px=32, num_classes=10)


class Fake:
    """Takes a second per step and writes down when it was its turn."""

    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def run(self, steps):
        self.turns.append(self.name)
        return float(steps)


def test_cases_take_turns():
    turns = []
    seconds = measure.take_turns({n: Fake(n, turns) for n in "ab"}, rounds=3, min_seconds=2.0)
    assert turns[4:] == ["a", "b"] * 3  # behind two turns each to find the number of steps
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_what_cannot_be_measured_is_left_out_and_the_others_go_on(capsys):
    class Fails(Fake):
        def run(self, steps):
            if self.turns.count(self.name) == self.after:
                raise measure.LeftOut(f"{self.name} does not fit")
            return super().run(steps)

    turns = []
    runners = {n: Fails(n, turns) for n in "abc"}
    for runner, after in zip(runners.values(), (0, 3, None)):
        runner.after = after
    seconds = measure.take_turns(runners, rounds=3, min_seconds=1.0)
    assert seconds == {"c": [1.0] * 3}
    assert capsys.readouterr().err == "left out: a does not fit\nleft out: b does not fit\n"


def test_a_case_that_does_not_fit_is_left_out(monkeypatch):
    def full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    runner = Ours(CASE)
    monkeypatch.setattr(runner, "_begin", full)
    with pytest.raises(measure.LeftOut, match=r"vit_flax mu/16 b2 float32 train .* does not fit into the memory"):
        runner.run(1)


def test_a_case_keeps_no_arrays_between_its_turns():
    runner = Ours(CASE)
    runner.run(1)
    before = {id(x) for x in jax.live_arrays()}
    runner.run(1)
    assert not [x for x in jax.live_arrays() if id(x) not in before]


def test_a_ratio_is_taken_within_the_rounds():
    assert measure.ratio([1.0, 10.0, 3.0], [2.0, 20.0, 6.0]) == 0.5


@pytest.mark.parametrize("mode", ["forward", "train", "loop"])
def test_a_case_runs_and_its_row_adds_up(mode):
    case = Case("mu/16", 2, mode, "float32", image_px=32, num_classes=10)
    runner = Ours(case)
    assert runner.run(2) > 0
    row = report.row(
        case, [0.5, 0.25, 1.0], ceiling_gflops=1e-3, versus_first=1.0, compile_seconds=0.0, memory_bytes=2**20
    )
    assert row["images_per_second"] == 4.0
    assert (row["low"], row["high"], row["rounds"]) == (2.0, 8.0, 3)
    assert row["fraction_of_matmul"] == pytest.approx(case.flops() / 0.5 / 1e6, rel=1e-2)
    assert row["program_mib"] == 1.0
    assert report.table([row]).count("\n") == 2


def test_a_training_step_counts_three_forward_passes():
    forward = Case("mu/16", 2, "forward", "float32", image_px=32, num_classes=10)
    assert CASE.flops() == 3 * forward.flops()


def test_layers_choose_scan_loop_or_unrolling():
    def model(layers):
        return Case("mu/16", 2, "train", "float32", layers=layers).model()

    assert (model("scan").scan, model("scan").scan_unroll) == (True, 1)
    assert (model("auto").scan, model("auto").scan_unroll) == (True, None)
    assert model("loop").scan is False
    assert (model("4").scan, model("4").scan_unroll) == (True, 4)


@pytest.mark.parametrize(("limit", "start"), [(0, 8), (1, 8), (7, 8), (8, 8), (1000, 8), (1000, 3000)])
def test_the_largest_that_fits_is_found_to_an_eighth(limit, start):
    tried = []
    found = command.largest_that(lambda n: tried.append(n) or n <= limit, start)
    assert limit * 8 / 9 - 1 < found <= limit
    assert found in tried or found == 0
    assert len(tried) < 16


def test_find_batch_asks_the_compiler(monkeypatch):
    case = Case("mu/16", 2, "forward", "float32", image_px=32, num_classes=10)
    monkeypatch.setattr(measure, "free_memory_bytes", lambda: 2**19)
    found = command.find_batch(case)
    assert found["largest_batch"] >= 2
    assert 0 < found["program_mib"] <= found["limit_mib"] == 0.5


@pytest.mark.parametrize(
    ("kind", "gflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989_000),
        ("NVIDIA H100 PCIe", 756_000),
        ("NVIDIA L4", 121_000),
        ("NVIDIA L40", None),
        ("TPU v4", 275_000),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_data_sheet_knows_exact_kinds_of_devices(monkeypatch, kind, gflops):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert measure.data_sheet_gflops("bfloat16") == gflops
    assert measure.data_sheet_gflops("float32") is None


def test_hyphens_and_underscores_name_the_same_flag():
    assert command.with_underscores(["x-y", "--find-batch", "--layers=a-b"]) == ["x-y", "--find_batch", "--layers=a-b"]


def test_forward_passes_are_measured_once_whatever_remat(capsys):
    flags = command.flags.FLAGS
    with flagsaver.flagsaver():
        flags(["x", "--variant=mu/16,Ti/16", "--mode=forward,train", "--remat=dots,none", "--layers=scan,2"])
        cases = command.cases_of_flags()
    assert len(cases) == 2 * (2 + 2 * 2)
    assert {case.remat for case in cases if case.mode == "forward"} == {"dots"}


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in {"ml_collections", "jaxtyping", "beartype", "grain", "PIL", "sklearn"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
import runpy
sys.argv[1:] = "--variant mu/16 --batch 2 --mode train --image_px 32 --rounds 2 --min_seconds 0.001".split()
runpy.run_module("vit_flax.benchmark", run_name="__main__")
"""


def test_the_command_needs_five_libraries_and_prints_one_json_line():
    done = subprocess.run([sys.executable, "-c", BLOCK], text=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    assert figures["images_per_second"] > 0
    assert figures["matmul_gflops"] > 0
    assert figures["peak_mib"] > 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--image_px=100", "patch"),
        ("--compile_depths=2,a", "--compile_depths=a: expected a positive whole number"),
        ("--compile_depths=0", "--compile_depths=0: expected a positive whole number"),
        ("--batch=²", "--batch=²: expected a positive whole number"),
    ],
)
def test_flags_that_make_no_sense_are_usage_errors_before_anything_is_measured(monkeypatch, flag, message):
    for part in ("compare", "compile_times", "find_batch"):
        monkeypatch.setattr(command, part, lambda _: pytest.fail("measured"))
    with flagsaver.flagsaver():
        command.flags.FLAGS(["x", "--variant=mu/16", flag])
        with pytest.raises(app.UsageError, match=message):
            command.main(["x"])


@pytest.mark.parametrize("flag", ["--image_px=0", "--num_classes=0", "--rounds=0", "--min_seconds=-1"])
def test_numbers_below_their_bounds_are_no_flags(flag):
    with (
        flagsaver.flagsaver(),
        pytest.raises(command.flags.IllegalFlagValueError, match=r"or greater|positive|negative"),
    ):
        command.flags.FLAGS(["x", flag])


def test_a_word_that_is_no_choice_is_an_error_with_the_choices():
    argv = ["-m", "vit_flax.benchmark", "--mode=backward"]
    done = subprocess.run([sys.executable, *argv], text=True, cwd=ROOT, capture_output=True)
    assert done.returncode != 0
    assert "--mode=backward is unknown: expected forward, train, loop" in done.stdout + done.stderr


def test_each_group_is_measured_by_itself_and_a_peer_takes_its_turns():
    flags = "--variant mu/16 --batch 2 --image_px 32 --rounds 2 --min_seconds 0.001 --mode forward,train --peers"
    code = f"""
import sys, runpy
from vit_flax.benchmark import peers
peers.PEERS = {{"flax": peers.PEERS["flax"], "none": ("not_installed", None, {{}})}}
sys.argv[1:] = {flags.split()!r}
runpy.run_module("vit_flax.benchmark", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(row["mode"], row["library"]) for row in rows] == [
        ("forward", "vit_flax"),
        ("forward", "flax"),
        ("train", "vit_flax"),
        ("train", "flax"),
    ]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert "left out, not_installed is not installed: none" in done.stderr
