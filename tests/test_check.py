import io
import sys

import numpy as np
import pytest
from PIL import Image

from vit_flax.data import check as check_module
from vit_flax.data.arrays import Arrays
from vit_flax.data.check import Report, check, main


def jpeg(width=8, height=6):
    data = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "train" / name / f"{i}.jpg").write_bytes(jpeg(8 + i))
    return tmp_path


def test_good_source(folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal, where it draws its bar
    assert main(["--source", "folder", f"root={folder}", "--splits", "train"]) == 0
    expected = "train: 6 records, 0 bad; 2 classes of 3 to 3 (cat, dog); pictures from 8x6 to 10x6 px, "
    assert capsys.readouterr().out == expected + "short side 6 px in the median, 6 to 6 in the middle 80 %\n"


def test_the_usual_size_is_not_that_of_a_few_odd_pictures(tmp_path, capsys):
    for i, side in enumerate([1, *range(20, 31), 400]):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.jpg").write_bytes(jpeg(2 * side, side))
    assert main(["--source", "folder", f"root={tmp_path}", "--splits", "all"]) == 0
    expected = "from 2x1 to 800x400 px, short side 25 px in the median, 20 to 30 in the middle 80 %\n"
    assert capsys.readouterr().out.endswith(expected)


def test_all_bad_files_are_listed_at_once(folder, capsys):
    bad = {"cat/0.jpg": b"", "cat/2.jpg": jpeg()[:-20], "dog/1.jpg": b"<html>not found</html>"}
    for path, data in bad.items():
        (folder / "train" / path).write_bytes(data)
    assert main(["--source", "folder", f"root={folder}", "--splits", "train"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for path, line in zip(bad, lines):
        assert str(folder / "train" / path) in line
    assert "3 bad; 2 classes of 1 to 2" in lines[-1]


def test_only_some_of_many_classes_are_named(tmp_path, capsys):
    for i in range(12):
        (tmp_path / f"class{i:02d}").mkdir()
        (tmp_path / f"class{i:02d}" / "0.jpg").write_bytes(jpeg())
    assert main(["--source", "folder", f"root={tmp_path}", "--splits", "all"]) == 0
    assert "(class00, class01, " in (printed := capsys.readouterr().out)
    assert "class09 and 2 more)" in printed


def test_all_files_are_bad(folder, capsys):
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"")
    assert main(["--source", "folder", f"root={folder}", "--splits", "train"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "train: 6 records, 6 bad; 2 classes of 0 to 0 (cat, dog)"


def test_an_interruption_loses_nothing_that_was_found(folder, capsys, monkeypatch):
    def check_half(source):
        yield Report(problems=["cat/0.jpg is bad"], num_examples=3)
        raise KeyboardInterrupt

    monkeypatch.setattr(check_module, "check", check_half)
    assert main(["--source", "folder", f"root={folder}", "--splits", "train", "train"]) == 130
    printed = capsys.readouterr()
    assert printed.out.startswith("cat/0.jpg is bad\ntrain: 3 records, 1 bad")
    assert "interrupted after 3 of 6 records of train" in printed.err


def test_a_file_that_disappeared(folder):
    from vit_flax.data.folder import Folder

    source = Folder(root=folder, split="train")
    (folder / "train" / "dog" / "2.jpg").unlink()
    (*_, report) = check(source)
    assert len(report.problems) == 1
    assert "dog/2.jpg" in report.problems[0]


def test_bad_labels():
    class Wrong(Arrays):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "label": 7 if index == 1100 else 0}

    source = Wrong(split="train", arrays={"train": (np.zeros((1200, 4, 4, 3), np.uint8), np.arange(1200) % 3)})
    (*_, report) = check(source)
    assert report.problems == ["arrays:train[1100]: label 7 is outside 0..2 (3 classes)"]
    assert report.num_examples == 1200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "foldr", "--splits", "train"], "did you mean 'folder'"),
        (["--source", "folder", "root", "--splits", "train"], "expected key=value"),
        (["--source", "folder", "rot=x", "--splits", "train"], "unexpected keyword argument 'rot'"),
        (["--source", "folder", "root=/nowhere", "--splits", "train"], "/nowhere, found nothing"),
        (["--source", "hf", "dataset=user/name", "--splits", "train"], "pip install datasets"),
    ],
)
def test_bad_command_lines(capsys, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an extra dependency that may be missing
    assert main(words) == 2
    assert message in capsys.readouterr().err
