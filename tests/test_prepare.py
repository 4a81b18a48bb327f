import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vit_flax.data import prepare as prepare_module
from vit_flax.data.check import check
from vit_flax.data.decode import DecodeError
from vit_flax.data.prepare import encode_picture, main, prepare
from vit_flax.data.sources import make_source


def picture(width, height, file_format="JPEG", seed=0):
    """Smooth, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    data = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(data, file_format)
    return data.getvalue()


def size(data):
    return Image.open(io.BytesIO(data)).size


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for split, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(picture(60 + i, 40, seed=i))
    return root


def test_larger_pictures_are_scaled_to_the_short_side():
    stored = encode_picture(picture(300, 200), "a", short_side_px=50, quality=90)
    assert size(stored) == (75, 50)
    assert size(encode_picture(picture(40, 90), "a", short_side_px=20, quality=90)) == (20, 45)
    assert size(encode_picture(picture(500, 2), "a", short_side_px=1, quality=90)) == (250, 1)
    original = np.asarray(Image.open(io.BytesIO(picture(300, 200))).resize((75, 50), Image.Resampling.BICUBIC), int)
    assert abs(np.asarray(Image.open(io.BytesIO(stored)), int) - original).mean() < 2.5


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("short_side_px", [None, 40, 100])
def test_smaller_pictures_are_kept_as_they_are(file_format, short_side_px):
    data = picture(60, 40, file_format)
    assert encode_picture(data, "a", short_side_px=short_side_px, quality=50) == data


def test_arrays_are_stored_without_loss():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    stored = encode_picture(pixels, "a", short_side_px=32, quality=50)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), pixels)


def test_kept_pictures_are_decoded_too():
    with pytest.raises(DecodeError, match="the one"):
        encode_picture(picture(60, 40)[:-100], "the one", short_side_px=100, quality=90)


def test_only_one_process_writes_a_folder(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    code = (
        f"import fcntl, os; fcntl.flock(os.open({str(out)!r}, os.O_RDONLY), fcntl.LOCK_SH); print(flush=True); input()"
    )
    arguments = dict(splits=["val"], out=out, short_side_px=20, num_workers=1)
    source = {"name": "folder", "root": folder}
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process"):
            prepare(source, **arguments)
        assert not any(out.iterdir())
        other.communicate("\n")
    assert prepare(source, **arguments) == out
    assert len(make_source(name="records", directory=out, split="val")) == 4


def test_command(folder, tmp_path, capsys):
    words = ["--source", "folder", f"root={folder}", "--splits", "train", "val", "--short_side_px", "20"]
    words += ["--out", str(tmp_path / "out"), "--num_workers", "2"]
    assert main(words) == 0
    assert "train 10, val 4; 0 skipped" in capsys.readouterr().out
    for split in ("train", "val"):
        original = make_source(name="folder", root=folder, split=split)
        stored = make_source(name="records", directory=tmp_path / "out", split=split)
        assert stored.class_names == original.class_names
        assert len(stored) == len(original)
        for i in range(len(stored)):
            assert stored[i]["label"] == original[i]["label"]
            assert stored[i]["id"] == original[i]["id"]
            assert min(size(stored[i]["image"])) == 20
    assert make_source(name="records", directory=tmp_path / "out", split="train[:3]+val")[3]["id"].endswith(
        "val/cat/0.jpg"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "records.json",
        "train-00000-of-00001.array_record",
        "val-00000-of-00001.array_record",
    ]
    before = (tmp_path / "out" / "train-00000-of-00001.array_record").stat().st_mtime_ns
    assert main(words) == 0  # nothing left to do
    assert (tmp_path / "out" / "train-00000-of-00001.array_record").stat().st_mtime_ns == before
    assert main([*words, "--quality", "50"]) == 2
    assert "another preparation (other quality)" in capsys.readouterr().err


def test_other_files_are_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no preparation"):
        prepare({"name": "folder", "root": folder}, splits=["train"], out=tmp_path / "out", short_side_px=20)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_kill_while_the_plan_is_written_is_no_preparation_of_others(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = dict(source={"name": "folder", "root": str(folder)}, splits=["train"], out=out, short_side_px=None)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.os, "replace", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            prepare(**arguments)
    assert [path.name for path in out.iterdir()] == [".plan.json.new"]
    prepare(**arguments, num_workers=1)
    assert len(make_source(name="records", directory=out, split="train")) == 10


def test_bad_pictures(folder, tmp_path, capsys):
    bad = folder / "train" / "dog" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:-50])
    words = ["--source", "folder", f"root={folder}", "--splits", "train", "--out", str(tmp_path / "out")]
    assert main([*words, "--num_workers", "1"]) == 2
    assert str(bad) in capsys.readouterr().err
    assert main([*words, "--num_workers", "1", "--on_error", "skip"]) == 0  # goes on in the same folder
    printed = capsys.readouterr().out
    assert f"skipped: cannot decode '{bad}'" in printed
    assert "train 9; 1 skipped" in printed
    assert len(make_source(name="records", directory=tmp_path / "out", split="train")) == 9
    assert main([*words, "--num_workers", "1"]) == 2  # the other way, pictures would be missing
    assert "other on_error" in capsys.readouterr().err


def test_a_killed_preparation_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "MIN_SHARD_EXAMPLES", 4)
    out = tmp_path / "out"
    source = {"name": "folder", "root": str(folder)}
    # A worker that never gets past the second shard stands for a job that is killed there.
    script = f"""
import os, time
from vit_flax.data import prepare
prepare.MIN_SHARD_EXAMPLES = 4
if __name__ == "__main__":
    prepare.prepare({source!r}, splits=["train"], out={str(out)!r}, short_side_px=None, num_workers=1)
"""
    (tmp_path / "job.py").write_text(script)
    fifo = folder / "train" / "cat" / "4.jpg"  # row 4: the first of the second shard
    data = fifo.read_bytes()
    fifo.unlink()
    os.mkfifo(fifo)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    job = subprocess.Popen([sys.executable, str(tmp_path / "job.py")], env=environment, start_new_session=True)
    first = out / "train-00000-of-00003.array_record"
    for _ in range(300):
        if first.exists() or job.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(0.3)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert first.exists()
    assert not (out / "records.json").exists()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        make_source(name="records", directory=out, split="train")
    fifo.unlink()
    fifo.write_bytes(data)
    written = first.stat().st_mtime_ns
    prepare(source, splits=["train"], out=out, short_side_px=None, num_workers=1)
    assert first.stat().st_mtime_ns == written
    stored, original = (
        make_source(split="train", **arguments) for arguments in ({"name": "records", "directory": out}, source)
    )
    assert [stored[i]["image"] for i in range(10)] == [original[i]["image"] for i in range(10)]
    assert len(list(out.iterdir())) == 4


def end_process(*_, **__):
    os._exit(9)


def test_a_killed_worker_process_is_no_traceback(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "encode_picture", end_process)
    words = ["--source", "folder", f"root={folder}", "--splits", "val", "--out", str(tmp_path / "out")]
    assert main([*words, "--num_workers", "1"]) == 2
    assert "error: a worker process was killed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short_side_px": 0}, "short_side_px=0"),
        ({"quality": 99}, "quality=99"),
        ({"splits": ["train[:5]"]}, "whole splits"),
        ({"splits": ["tran"]}, "no split 'tran'"),
    ],
)
def test_bad_arguments(folder, tmp_path, arguments, message):
    arguments = {"splits": ["train"], "short_side_px": 20, **arguments}
    with pytest.raises(ValueError, match=message):
        prepare({"name": "folder", "root": folder}, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_damaged_shards_and_records_are_named(folder, tmp_path):
    out = prepare({"name": "folder", "root": folder}, splits=["train"], out=tmp_path / "out", short_side_px=None)
    shard = out / "train-00000-of-00001.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:1500] + bytes(byte ^ 0xFF for byte in data[1500:1600]) + data[1600:])
    (*_, report) = check(make_source(name="records", directory=out, split="train"))
    assert len(report.problems) in (1, 2)
    assert f"'{out}:train[" in report.problems[0]
    assert "the record is damaged" in report.problems[0]
    shard.write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=f"{shard} is damaged"):
        make_source(name="records", directory=out, split="train")


def test_a_missing_shard_is_named(folder, tmp_path):
    source = {"name": "folder", "root": folder}
    out = prepare(source, splits=["val"], out=tmp_path / "out", short_side_px=20, num_workers=1)
    index = json.loads((out / "records.json").read_text())
    index["splits"]["val"]["shards"]["val-00000-of-00001.array_record"] = 5
    (out / "records.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="4 records in val, expected 5"):
        make_source(name="records", directory=out, split="val")
    (out / "val-00000-of-00001.array_record").unlink()
    with pytest.raises(FileNotFoundError, match=r"val-00000-of-00001.array_record"):
        make_source(name="records", directory=out, split="val")
