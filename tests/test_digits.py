import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_flax.data.datadir import write_once
from vit_flax.data.digits import NUM_TEST, SPLIT_SEED, prepare_digits, read_digits
from vit_flax.data.sources import make_source

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    prepare_digits(folder)
    return folder


def test_splits_partition_the_file(data_dir):
    train = make_source(name="digits", split="train", data_dir=data_dir)
    test = make_source(name="digits", split="test", data_dir=data_dir)
    assert (len(train), len(test)) == (1438, 359)
    assert train.class_names == tuple("0123456789")
    assert len(make_source(name="digits", split="train[:90%]", data_dir=data_dir)) == 1294
    images, labels = read_digits()
    held_out = np.random.default_rng(SPLIT_SEED).permutation(len(images))[:NUM_TEST]
    expected = sorted((images[row].tobytes(), labels[row]) for row in held_out)
    assert sorted((_pixels(example), example["label"]) for example in test) == expected


def test_grey_levels_fill_the_range():
    images, labels = read_digits()
    assert (images.min(), images.max()) == (0, 255)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_two_processes_prepare_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        first, second = pool.map(prepare_digits, [tmp_path, tmp_path])
    assert first == second
    assert [path.name for path in first.parent.iterdir()] == ["1.0.0"]
    assert len(make_source(name="digits", split="train", data_dir=tmp_path)) == 1438


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    old = time.time() - 7200
    for name in (".preparing-left", ".preparing-held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.array_record").write_bytes(b"half")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / ".preparing-new").mkdir()

    def write(scratch):
        os.utime(scratch, (old, old))
        write_once(tmp_path / "other", lambda folder: (folder / "done").touch(), marker="done")  # another process
        (scratch / "done").touch()

    held = os.open(tmp_path / ".preparing-held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    write_once(tmp_path / "set", write, marker="done")
    os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".preparing-held", ".preparing-new", "other", "set"]


def test_a_foreign_folder_in_its_place_is_left_alone(tmp_path):
    foreign = tmp_path / "digits" / "1.0.0"
    foreign.mkdir(parents=True)
    (foreign / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="move it away"):
        prepare_digits(tmp_path)
    assert [path.name for path in foreign.parent.iterdir()] == ["1.0.0"]
    assert (foreign / "mine.txt").read_text() == "mine"


def test_reads_without_tensorflow_and_without_importing_scikit_learn(data_dir):
    code = """
import sys
from vit_flax.data.sources import make_source
make_source(name="digits", split="train", data_dir=sys.argv[1])[0]
print(sorted({"tensorflow", "sklearn"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(data_dir)], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


def _pixels(example):
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(example["image"]))).tobytes()
