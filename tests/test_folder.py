import csv
import io
import os
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image

from vit_flax.data.folder import Folder, list_pictures
from vit_flax.data.sources import Source, make_source
from vit_flax.picture_folders import class_folders, held_out_split


def jpeg(shade=0):
    data = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), shade % 256, np.uint8)).save(data, "JPEG")
    return data.getvalue()


def fill(root, classes, num_pictures=3, suffix=".jpg"):
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(num_pictures):
            (root / name / f"{i}{suffix}").write_bytes(jpeg(i))


def paths_of(source):
    return [os.path.relpath(source[i]["id"], source.root) for i in range(len(source))]


def test_class_folders_are_split_by_hash(tmp_path):
    fill(tmp_path, ["cat", "dog"], 100)
    train, val, whole = (make_source(name="folder", root=tmp_path, split=split) for split in ("train", "val", "all"))
    assert isinstance(train, Source)
    assert train.class_names == val.class_names == ("cat", "dog")
    assert sorted(paths_of(train) + paths_of(val)) == sorted(paths_of(whole))
    assert len(whole) == 200
    assert 8 <= len(val) <= 32  # 10 % of 200, within three sigma
    labels = {(path.split("/")[0], int(whole[i]["label"])) for i, path in enumerate(paths_of(whole))}
    assert labels == {("cat", 0), ("dog", 1)}
    assert whole[5]["image"] == (tmp_path / paths_of(whole)[5]).read_bytes()


def test_more_pictures_move_none_between_the_parts(tmp_path):
    fill(tmp_path, ["cat", "dog"], 50)
    before = paths_of(Folder(root=tmp_path, split="val"))
    fill(tmp_path, ["cat", "dog", "emu"], 80)
    after = paths_of(Folder(root=tmp_path, split="val"))
    assert set(before) == {path for path in after if path.split("/")[0] != "emu" and int(path[4:-4]) < 50}


def test_split_folders(tmp_path):
    fill(tmp_path / "train", ["b", "a"], 3)
    fill(tmp_path / "val", ["a", "b"], 2)
    (tmp_path / "LICENSE").write_text("free")
    train, val = (Folder(root=tmp_path, split=split) for split in ("train", "val"))
    assert (len(train), len(val), train.class_names) == (6, 4, ("a", "b"))
    assert paths_of(val) == ["val/a/0.jpg", "val/a/1.jpg", "val/b/0.jpg", "val/b/1.jpg"]
    with pytest.raises(ValueError, match=r"no split 'test'.*\['train', 'val'\]"):
        Folder(root=tmp_path, split="test")


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, ["train", "plane"])
    assert Folder(root=tmp_path, split="all").class_names == ("plane", "train")


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("TRAIN", "validation"), ("train", "Test")])
def test_split_folders_in_any_case(tmp_path, train, val):
    for split, count in ((train, 3), (val, 2)):
        fill(tmp_path / split, ["cat", "dog"], count)
    assert held_out_split(tmp_path) == val.lower()
    assert class_folders(tmp_path) == ["cat", "dog"]
    first, second = (Folder(root=tmp_path, split=split) for split in ("train", val.lower()))
    assert (first.class_names, len(first), len(second)) == (("cat", "dog"), 6, 4)
    assert paths_of(second)[0] == f"{val}/cat/0.jpg"


def test_what_macos_leaves_beside_the_class_folders_is_no_picture(tmp_path):
    fill(tmp_path / "train", ["cat", "dog"])
    (tmp_path / "train" / "._cat.jpg").write_bytes(b"")
    assert Folder(root=tmp_path, split="train").class_names == ("cat", "dog")


def test_a_picture_beside_the_class_folders_makes_no_classes_of_the_splits(tmp_path, caplog):
    for split in ("train", "val"):
        fill(tmp_path / split, ["cat", "dog"])
    (tmp_path / "train" / "stray.jpg").write_bytes(jpeg())
    source = Folder(root=tmp_path, split="train")
    assert (source.class_names, len(source), class_folders(tmp_path)) == (("cat", "dog"), 6, ["cat", "dog"])
    assert caplog.text.rstrip().endswith(": stray.jpg")


def test_pictures_in_the_root_itself_have_plain_names(tmp_path):
    fill(tmp_path, ["cat"], 1)
    (tmp_path / "top.jpg").write_bytes(jpeg())
    assert list_pictures(tmp_path, tmp_path, []) == ["cat/0.jpg", "top.jpg"]


def test_two_splits_of_one_name_are_refused(tmp_path):
    for split in ("train", "Val", "val"):
        fill(tmp_path / split, ["cat", "dog"], 1)
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system knows one case only")
    with pytest.raises(ValueError, match="two of them have the same name"):
        Folder(root=tmp_path, split="train")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (["pets/cat", "pets/dog"], r"found one, pets, with the folders cat, dog; if those .* name .*/pets\."),
        (["cat"], r"found one, cat\. With one class"),
        (["train/pets/cat", "train/pets/dog", "val/pets/cat"], "/train, found one, pets, with the folders cat, dog"),
        (["Training/cat", "Training/dog", "Testing/cat"], "look like splits .*: Testing, Training. Call the one"),
        (["val/cat", "val/dog", "test/cat"], "look like splits .*: test, val. Call the one"),
    ],
)
def test_a_folder_of_another_level_is_not_taken_for_classes(tmp_path, layout, message):
    for path in layout:
        fill(tmp_path / path, ["."])
    with pytest.raises(ValueError, match=message):
        Folder(root=tmp_path, split="train")


def test_splits_with_other_classes_are_refused(tmp_path):
    fill(tmp_path / "train", ["cat", "dog"])
    fill(tmp_path / "val", ["cat", "dgo"])
    with pytest.raises(ValueError, match="only in train: dog; only in val: dgo"):
        Folder(root=tmp_path, split="val")


def test_nested_folders_and_suffixes(tmp_path):
    fill(tmp_path / "cat", ["one", "two"], 1)
    fill(tmp_path, ["cat"], 1, ".PNG")
    fill(tmp_path, ["cat"], 1, ".webp")
    fill(tmp_path, ["cat"], 1, ".gif")
    fill(tmp_path, ["cat"], 1, ".TIF")
    fill(tmp_path, ["dog"], 1)
    assert paths_of(Folder(root=tmp_path, split="all")) == [
        "cat/0.PNG",
        "cat/0.TIF",
        "cat/0.gif",
        "cat/0.webp",
        "cat/one/0.jpg",
        "cat/two/0.jpg",
        "dog/0.jpg",
    ]


def test_other_files_are_named(tmp_path, caplog):
    fill(tmp_path, ["cat", "dog"])
    (tmp_path / "cat" / "notes.txt").write_text("")
    (tmp_path / "cat" / ".DS_Store").write_text("")
    (tmp_path / "in_no_class.jpg").write_bytes(jpeg())
    assert len(Folder(root=tmp_path, split="all")) == 6
    Folder(root=tmp_path, split="train")
    (message,) = (record.getMessage() for record in caplog.records)  # once, not for each split
    assert message.endswith(".tiff: cat/notes.txt, in_no_class.jpg")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "no class folders"),
        ({"picture.jpg": b""}, "no class folders"),
        ({"cat/0.jpg": b"", "dog/readme.txt": b""}, "without a picture.*dog"),
        ({"train/cat/0.jpg": b"", "train/dog/x.txt": b""}, "without a picture.*dog"),
        ({"train/0.jpg": b"", "test/0.jpg": b""}, "/train has no class folders"),
    ],
)
def test_folders_without_pictures(tmp_path, layout, message):
    for path, data in layout.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        Folder(root=tmp_path, split="train")


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere, found nothing"):
        Folder(root=tmp_path / "nowhere", split="train")


def test_a_class_whose_pictures_are_all_held_out(tmp_path):
    fill(tmp_path, ["cat"], 50)
    fill(tmp_path, ["dog"], 1)
    with pytest.raises(ValueError, match=r"held-out 99.9 %: cat, dog|held-out 99.9 %: dog"):
        Folder(root=tmp_path, split="train", held_out_percent=99.9)


def test_too_few_pictures_to_hold_any_out(tmp_path):
    fill(tmp_path, ["cat", "dog"], 2)
    with pytest.raises(ValueError, match=r"none of the 4 pictures .* held-out 0.001 %; .*raise held_out_percent"):
        Folder(root=tmp_path, split="val", held_out_percent=0.001)


def test_names_that_are_not_utf8_are_named(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    try:
        (tmp_path / "cat" / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(jpeg())
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(ValueError, match=r"\\xff\\xfe.jpg.*rename"):
        Folder(root=tmp_path, split="all")


def test_names_in_two_unicode_forms_are_the_same_class(tmp_path):
    fill(tmp_path / "train", ["caf\u00e9", "bar"])
    fill(tmp_path / "val", ["cafe\u0301", "bar"])
    assert Folder(root=tmp_path, split="val").class_names == Folder(root=tmp_path, split="train").class_names


def test_a_picture_that_disappears_is_named(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    source = Folder(root=tmp_path, split="all")
    (tmp_path / "cat" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"cat/1.jpg"):
        source[1]


def test_the_two_forms_of_a_name_are_held_out_alike(tmp_path):
    held_out = []
    for form in ("NFC", "NFD"):
        fill(
            tmp_path / form,
            [unicodedata.normalize(form, name) for name in ("caf\u00e9", "t\u00ea", "\u00e9t\u00e9")],
            40,
        )
        paths = paths_of(Folder(root=tmp_path / form, split="val"))
        held_out.append({unicodedata.normalize("NFC", path) for path in paths})
    assert held_out[0] == held_out[1]


def test_fingerprint_sees_another_file(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    first, again = (Folder(root=tmp_path, split="all").fingerprint() for _ in range(2))
    (tmp_path / "cat" / "2.jpg").rename(tmp_path / "cat" / "3.jpg")
    other = Folder(root=tmp_path, split="all").fingerprint()
    assert first == again
    assert {key for key in first if first[key] != other[key]} == {"digest"}


def test_pickling(tmp_path):
    fill(tmp_path, ["cat", "dog"])
    source = Folder(root=tmp_path, split="all")
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def write_table(file, rows):
    with open(file, "w", newline="", encoding="utf-8") as text:
        csv.writer(text).writerows(rows)
    return file


def test_table_with_splits(tmp_path):
    fill(tmp_path, ["x"], 4)
    rows = [("path", "label", "split"), ("x/0.jpg", "10", "train"), ("x/1.jpg", "9", "train"), ("x/2.jpg", "9", "val")]
    table = write_table(tmp_path / "labels.csv", rows)
    train, val = (make_source(name="folder", csv=table, split=split) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("9", "10")  # as numbers
    assert [(path, int(train[i]["label"])) for i, path in enumerate(paths_of(train))] == [
        ("x/0.jpg", 1),
        ("x/1.jpg", 0),
    ]
    assert paths_of(val) == ["x/2.jpg"]
    with pytest.raises(ValueError, match=r"no split 'test'.*train, val"):
        Folder(csv=table, split="test")


def test_table_without_splits(tmp_path):
    fill(tmp_path / "pictures", ["x"], 60)
    rows = [("path", "label"), *((f"x/{i}.jpg", "even" if i % 2 == 0 else "odd") for i in range(60))]
    table = write_table(tmp_path / "labels.csv", rows)
    train, val = (Folder(csv=table, root=tmp_path / "pictures", split=split) for split in ("train", "val"))
    assert sorted(paths_of(train) + paths_of(val)) == sorted(path for path, _ in rows[1:])
    assert len(val) > 0
    assert val[0]["image"] == (tmp_path / "pictures" / paths_of(val)[0]).read_bytes()


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([("file", "label"), ("x/0.jpg", "a")], ValueError, "path,label.*file"),
        ([("path", "label")], ValueError, "lists no pictures"),
        ([("path", "label"), ("x/0.jpg",)], ValueError, "line 2"),
        ([("path", "label"), ("x/0.jpg", "a", "b")], ValueError, "line 2"),
        ([("path", "label"), ("x/0.jpg", "a"), ("x/0.jpg", "b")], ValueError, "two labels, 'a' and 'b'"),
        ([("path", "label"), ("x/0.jpg", "a"), ("./x/0.jpg", "b")], ValueError, "two labels, 'a' and 'b'"),
        ([("path", "label"), ("x/0.jpg", "1"), ("x/1.jpg", "01")], ValueError, "two ways, e.g. '01' and 1"),
        ([("path", "label", "split"), ("x/0.jpg", "a", "fit")], ValueError, "no split 'train'.*fit"),
        ([("path", "label"), ("x/7.jpg", "a"), ("y/8.jpg", "a")], FileNotFoundError, "2 files .*x/7.jpg, y/8.jpg"),
        ([("path", "label", "split"), ("x/0.jpg", "a", "train"), ("x/1.jpg", "b", "val")], ValueError, "'train': b"),
        ([("path", "label"), ("x/0.jpg", "a"), ("x/1.jpg", "a ")], ValueError, "have the label 'a'. With one class"),
    ],
)
def test_bad_tables(tmp_path, rows, error, message):
    fill(tmp_path, ["x"])
    with pytest.raises(error, match=message):
        Folder(csv=write_table(tmp_path / "labels.csv", rows), split="train")


def test_blanks_in_a_table_do_not_count(tmp_path):
    fill(tmp_path, ["x"], 4)
    rows = [
        ("path", "label", "split"),
        ("x/0.jpg", "cat", "train"),
        ("x/1.jpg", "cat ", " train"),
        ("x/2.jpg", "dog", "train"),
        ("x/3.jpg", "cat", "val"),
    ]
    source = Folder(csv=write_table(tmp_path / "labels.csv", rows), split="train")
    assert (source.class_names, len(source)) == (("cat", "dog"), 3)


def test_a_table_in_another_encoding_is_named(tmp_path):
    fill(tmp_path, ["x"])
    (tmp_path / "labels.csv").write_bytes("path,label\nx/0.jpg,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels.csv is not UTF-8.*save it as UTF-8"):
        Folder(csv=tmp_path / "labels.csv", split="train")


def test_a_picture_in_two_splits_of_a_table_is_named(tmp_path, caplog):
    fill(tmp_path, ["x"])
    rows = [("path", "label", "split"), ("x/0.jpg", "b", "train"), ("x/1.jpg", "a", "train"), ("./x/1.jpg", "a", "val")]
    Folder(csv=write_table(tmp_path / "labels.csv", rows), split="train")
    assert "1 pictures are in more than one split: x/1.jpg" in caplog.text


def test_a_picture_in_two_spellings_is_one_picture(tmp_path, caplog):
    fill(tmp_path, ["x"], 60)
    spellings = [form.format(i) for i in range(60) for form in ("x/{}.jpg", "./x/{}.jpg", "x/../x//{}.jpg")]
    table = write_table(tmp_path / "labels.csv", [("path", "label"), *((path, path[-5]) for path in spellings)])
    train, val, whole = (paths_of(Folder(csv=table, split=split)) for split in ("train", "val", "all"))
    assert (len(whole), len(set(whole))) == (60, 60)
    assert not set(train) & set(val)
    assert "lists 60 pictures again; each counts once: x/0.jpg" in caplog.text


def test_a_quotation_mark_that_is_never_closed(tmp_path):
    fill(tmp_path, ["x"])
    (tmp_path / "labels.csv").write_text('path,label\nx/0.jpg,"cat\nx/1.jpg,cat\nx/2.jpg,dog\n')
    with pytest.raises(ValueError, match=r"labels.csv, line 4: .*check the quotation marks"):
        Folder(csv=tmp_path / "labels.csv", split="all")
