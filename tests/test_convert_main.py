"""`python -m vit_flax.convert` as a user meets it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_flax import load_pretrained, predict
from vit_flax.convert import __main__ as command

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "golden" / "vit_jax_prelinen.ckpt.npz"
EXACT_GELU = str(ROOT / "tests" / "golden" / "hf_ViTForImageClassification")
NO_CLASS_TOKEN = ROOT / "tests" / "golden" / "big_vision_map_scan.ckpt.npz"


def test_conversion_there_and_back_with_changes_on_the_way(tmp_path, capsys):
    own, back = tmp_path / "own", tmp_path / "back.npz"
    assert (
        command.main([str(CHECKPOINT), str(own), "--to", "vit_flax", "--num_classes", "3", "--image_size", "64x32"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "resampled      posemb/table [1, 16, 32] -> [1, 32, 32]" in printed
    assert printed.endswith(f"wrote {own} as vit_flax\n")
    assert load_pretrained(own).preprocess.image_size == (64, 32)
    ways = load_pretrained(own).report
    assert (ways.posemb_resize, ways.patch_resize) == ("bilinear_align_corners", "bilinear_antialias")
    assert command.main([str(CHECKPOINT), str(back), "--to", "npz"]) == 0
    theirs, ours = np.load(CHECKPOINT), np.load(back)
    np.testing.assert_array_equal(ours["head/kernel"], theirs["head/kernel"])


@pytest.mark.parametrize(
    ("name", "to", "lines"),
    [
        ("vit_jax_prelinen.ckpt.npz", "hf", ["preprocessing: stretch to 32x32 (bilinear, without antialiasing), mean"]),
        ("vit_jax_prelinen.ckpt.npz", "vit_flax", []),
        ("meta_dinov2", "hf", []),  # 0.875 of 18 pixels and 0.889 of 18 pixels are the same 16
        (
            "hf_SiglipForImageClassification",
            "npz",
            ["names of the 5 classes: this format has", "preprocessing: stretch to 16x16 (bicubic), mean"],
        ),
    ],
)
def test_what_the_format_has_no_place_for_is_said(name, to, lines, tmp_path, capsys):
    assert command.main([str(CHECKPOINT.with_name(name)), str(tmp_path / "out"), "--to", to]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  not kept ")]
    assert len(said) == len(lines)
    assert all(line in printed for line, printed in zip(lines, said, strict=True))


def test_the_weights_of_one_activation_are_written_for_another(tmp_path):
    fields = """{"activation": "gelu_tanh", "norm_eps": 1e-6}"""
    assert command.main([EXACT_GELU, str(tmp_path / "out.npz"), "--to", "npz", "--fields", fields]) == 0
    before, after = load_pretrained(EXACT_GELU), load_pretrained(tmp_path / "out.npz")
    assert (after.model.activation, after.model.norm_eps) == ("gelu_tanh", 1e-6)
    np.testing.assert_array_equal(after.params["head"]["kernel"], before.params["head"]["kernel"])


@pytest.mark.parametrize(
    ("problem", "described", "lost"),
    [
        ("regression", "they are numbers, as of a regression", "that the outputs are numbers and no classes"),
        (
            "multi_label_classification",
            "each has a probability of its own",
            "that the probabilities of the classes are the sigmoid of the logits",
        ),
    ],
)
def test_what_the_outputs_are_is_said(problem, described, lost, tmp_path, capsys):
    shutil.copytree(EXACT_GELU, tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"problem_type": problem}))
    assert command.main(["--describe", str(tmp_path / "in")]) == 0
    assert f"; {described}\n" in capsys.readouterr().out
    fields = """{"activation": "gelu_tanh", "norm_eps": 1e-6}"""
    assert command.main([str(tmp_path / "in"), str(tmp_path / "out.npz"), "--to", "npz", "--fields", fields]) == 0
    assert f"  not kept       {lost}\n" in capsys.readouterr().out


def test_description_says_what_the_file_is(capsys):
    assert command.main(["--describe", str(CHECKPOINT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["path", str(CHECKPOINT)]
    assert lines[1].startswith("family      google: google-research/vision_transformer")
    fields = "num_classes=5, patch_size=(8, 8), width=32, depth=3, mlp_dim=64, num_heads=4, activation='gelu_tanh'"
    assert lines[2] == f"model       {fields}"
    assert lines[3] == "image       32x32, 3 channels"
    assert "without antialiasing" in lines[4]
    assert lines[6] == "classes     5, without names"
    table = {line.split()[0]: line.split()[1:] for line in lines[8:]}
    assert table["cls"] == ["float32", "[1,", "1,", "32]", "cls_token/token"]
    block = table["Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/kernel"]
    assert block == ["x3", "float32", "[32,", "64]", "blocks/mlp/fc1/kernel"]
    assert table["Transformer/posembed_input/pos_embedding"][-3:] == ["cls_token/position", "+", "posemb/table"]
    # Every tensor of the file is in the table.
    counts = [int(cells[0][1:]) if cells[0].startswith("x") else 1 for cells in table.values()]
    assert sum(counts) == len(np.load(CHECKPOINT).files)


def test_description_names_what_is_unknown_and_what_is_not_used(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **dict(np.load(CHECKPOINT)), strange=np.zeros(3), t=np.zeros(1))
    assert command.main(["--describe", str(tmp_path / "a.npz")]) == 0
    rows = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["strange"] == "unknown"
    assert rows["t"] == "unused"
    np.savez(tmp_path / "b.npz", strange=np.zeros((2, 3)))
    assert command.main(["--describe", str(tmp_path / "b.npz")]) == 2
    printed = capsys.readouterr()
    assert printed.out.split() == ["strange", "float64", "[2,", "3]"]
    assert "is of no known family" in printed.err


def test_time_and_memory_are_measured(capsys, monkeypatch):
    from vit_flax.convert import measure

    loads = []
    monkeypatch.setattr(measure, "load_pretrained", lambda *a, **k: loads.append(a) or load_pretrained(*a, **k))
    assert command.main(["--describe", str(CHECKPOINT), "--time"]) == 0
    printed = capsys.readouterr().out
    assert len(loads) == 8  # seven turns against NumPy, one for the memory
    assert "1 file(s), 0.1 MiB; median of 7 turns" in printed
    assert "ratio" in printed
    assert "peak memory above the idle process" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.npz", "OUT", "--to", "npz"], "error: nowhere.npz: there is no such file or folder"),
        (
            [str(NO_CLASS_TOKEN), "OUT", "--to", "google"],
            "google: it would not be recognised as one\nNothing was written",
        ),
        (["nowhere.npz", "tests", "--to", "npz"], "tests exists and is not empty"),  # before anything is read
        (["nowhere.npz", "a.npz", "--to", "timm"], "a.npz: timm is written as a folder"),
        (["nowhere.npz", "a.safetensors", "--to", "npz"], "npz is written as a file: give a name that ends in .npz"),
        ([EXACT_GELU, "OUT", "--to", "npz"], "as 1e-06\nActivation and epsilon can be fixed by the code"),
        ([EXACT_GELU, "OUT", "--to", "hf:dinov3_vit"], "no place for posemb/table\nNothing was written"),
        ([str(CHECKPOINT), "OUT", "--to", "npz", "--family", "x"], "Unknown family 'x'"),
        (
            ["--describe", str(CHECKPOINT), "--num_classes", "0", "--fields", "{}", "--ignore", "a"],
            "changes nothing: leave --num_classes, --fields, --ignore out",
        ),
        (["--describe", "hf://a/b", "--time"], "hf://a/b is an address or a run"),
    ],
)
def test_mistakes_end_with_a_message_and_write_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert command.main([str(out) if a == "OUT" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


class Shut:
    """Standard output whose reader has gone."""

    def __init__(self, number):
        self.number = number

    def fileno(self):
        return self.number

    def write(self, text):
        raise BrokenPipeError

    flush = write


@pytest.mark.parametrize("run", [command.main, predict.main])
def test_a_reader_who_has_seen_enough_is_no_error(run, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    arguments = ["--describe", str(CHECKPOINT)]
    if run is predict.main:
        arguments = ["--checkpoint", str(CHECKPOINT), str(tmp_path / "picture.png")]
    with open(tmp_path / "out", "w") as file:
        monkeypatch.setattr(sys, "stdout", Shut(file.fileno()))
        assert run(arguments) == 0
        file.write("nobody reads this")
    assert not (tmp_path / "out").read_text()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("text", ["norm_eps", "[1]"])
def test_fields_that_are_no_json_object(text, capsys):
    with pytest.raises(SystemExit):
        command.main(["a", "b", "--to", "npz", "--fields", text])
    assert """expected JSON such as {"norm_eps": 1e-6}, found""" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--only", "--ignore"])
def test_what_is_no_regular_expression(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--parity", option, "("])
    assert f"argument {option}: expected a regular expression, found '('" in capsys.readouterr().err


def test_command_line_without_a_task():
    done = subprocess.run(
        [sys.executable, "-m", "vit_flax.convert", str(CHECKPOINT)], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 2
    assert "give IN OUT --to FORMAT, or --describe IN, or --parity" in done.stderr
    assert "Traceback" not in done.stderr
