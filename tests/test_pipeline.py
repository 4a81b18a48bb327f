import itertools
import json
import pickle

import numpy as np
import pytest

from vit_flax.data import make_data
from vit_flax.data.arrays import Arrays
from vit_flax.data.decode import DecodeError
from vit_flax.data.pipeline import Ahead, Order, eval_batches, train_batches
from vit_flax.data.transforms import Decode, Transform, make_transform


class AsIs:
    """The transform of nothing."""

    deterministic = True

    def __call__(self, example, rng):
        return example


class AddNoise:
    """Draws from the example's generator."""

    deterministic = False

    def __call__(self, example, rng):
        return {**example, "image": example["image"] ^ rng.integers(0, 256, example["image"].shape, dtype=np.uint8)}


def numbered(num_examples, num_classes=3, labels=None, split="train"):
    """Pictures that carry their own row number."""
    rows = np.arange(num_examples)
    images = np.stack([rows % 256, rows // 256], axis=-1).astype(np.uint8)[:, None, None, :]
    labels = rows % num_classes if labels is None else np.asarray(labels)
    return Arrays(split=split, arrays={"train": (images, labels)}, class_names=[str(c) for c in range(num_classes)])


class Rows:
    """A source of anything: the rows of a list of (image, label)."""

    def __init__(self, rows, num_classes=3):
        self.rows = rows
        self.class_names = tuple(str(label) for label in range(num_classes))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        image, label = self.rows[index]
        return {"image": image, "label": label, "id": f"row {index}"}

    def __repr__(self):
        return "Rows"

    def fingerprint(self):
        return {}


def labelled(labels):
    return Rows([(np.zeros((1, 1, 2), np.uint8), label) for label in labels])


def rows_of(batch):
    low, high = batch["image"][:, 0, 0].astype(int).T
    return (low + 256 * high)[batch["mask"]].tolist()


def take(batches, num_batches):
    taken = list(itertools.islice(batches, num_batches))
    batches.close()
    return taken


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batch_types():
    (batch,) = take(train_batches(numbered(10), transform=AsIs(), batch_size=4, seed=0), 1)
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "image": (np.uint8, (4, 1, 1, 2)),
        "label": (np.int32, (4,)),
        "mask": (np.bool_, (4,)),
    }
    assert batch["mask"].all()


@pytest.mark.parametrize("decode_once", [True, False])
def test_each_epoch_has_every_example_once_in_a_new_order(decode_once):
    batches = train_batches(numbered(12), transform=AsIs(), batch_size=4, seed=0, decode_once=decode_once)
    rows = [row for batch in take(batches, 6) for row in rows_of(batch)]
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))
    assert rows[:12] != rows[12:]


def test_decoding_once_changes_nothing():
    source, arguments = numbered(300), {"transform": AsIs(), "batch_size": 32, "seed": 3}
    once = take(train_batches(source, decode_once=True, **arguments), 20)
    each = take(train_batches(source, decode_once=False, num_threads=3, **arguments), 20)
    assert_same(once, each)


@pytest.mark.parametrize("transform", [AsIs(), AddNoise()])
def test_resume_at_a_step(transform):
    arguments = {"transform": transform, "batch_size": 8, "seed": 1}
    whole = take(train_batches(numbered(21), **arguments), 9)
    rest = take(train_batches(numbered(21), start_step=4, num_threads=3, **arguments), 5)
    assert_same(whole[4:], rest)


def test_neighbouring_seeds_share_no_epoch():
    orders = set()
    for seed in range(3):
        batches = take(train_batches(numbered(40), transform=AsIs(), batch_size=40, seed=seed), 3)
        orders |= {tuple(rows_of(batch)) for batch in batches}
    assert len(orders) == 9


@pytest.mark.parametrize("transform", [AsIs(), AddNoise()])
@pytest.mark.parametrize("process_count", [2, 4])
def test_parts_of_the_processes_in_their_order_are_the_global_batch(process_count, transform):
    """Row by row: masks of dropout and partners of mixup belong to a row, so that its order matters."""
    source, arguments = numbered(21), {"transform": transform, "batch_size": 8, "seed": 1, "start_step": 1}
    whole = take(train_batches(source, **arguments), 4)
    parts = [
        take(train_batches(source, process_index=i, process_count=process_count, **arguments), 4)
        for i in range(process_count)
    ]
    assert_same(whole, [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts)])


def test_parts_of_an_evaluation_in_their_order_are_the_global_batch():
    arguments = {"transform": AsIs(), "batch_size": 8}
    parts = [eval_batches(numbered(21), process_index=i, process_count=2, **arguments) for i in range(2)]
    joined = [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts)]
    assert_same(list(eval_batches(numbered(21), **arguments)), joined)


@pytest.mark.parametrize("decode_once", [True, False])
@pytest.mark.parametrize("num_examples", [1, 7, 8, 9, 103])
@pytest.mark.parametrize(("batch_size", "process_count"), [(1, 1), (8, 1), (8, 2), (12, 3)])
def test_evaluation_counts_each_example_once(num_examples, batch_size, process_count, decode_once):
    source, rows, sizes = numbered(num_examples), [], set()
    for process_index in range(process_count):
        batches = eval_batches(
            source,
            transform=AsIs(),
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            decode_once=decode_once,
            num_threads=1,
        )
        once, again = list(batches), list(batches)
        assert_same(once, again)
        assert len(once) == len(batches)
        sizes.add((len(once), *(len(batch["image"]) for batch in once)))
        for batch in once:
            rows += rows_of(batch)
            assert not batch["image"][~batch["mask"]].any()
    assert sorted(rows) == list(range(num_examples))
    assert len(sizes) == 1


def test_multi_label():
    labels = np.eye(3, dtype=np.uint8)[[0, 1, 2, 2]]
    for decode_once in (True, False):
        (batch,) = eval_batches(numbered(4, labels=labels), transform=AsIs(), batch_size=6, decode_once=decode_once)
        assert batch["label"].dtype == np.uint8
        np.testing.assert_array_equal(batch["label"], np.concatenate([labels, np.zeros((2, 3))]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, "multiple of the 2 processes"),
        ({"batch_size": 0}, "positive"),
        ({"batch_size": 11}, "larger than the 10 examples"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "outside 0..1"),
        ({"batch_size": 4, "num_threads": 0}, "num_threads"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers"),
        ({"batch_size": 4, "start_step": -1}, "start_step"),
        ({"batch_size": 4, "decode_once": True, "transform": AddNoise()}, "random numbers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_batches(numbered(10), seed=0, **{"transform": AsIs(), **arguments})


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("decode_once", [True, False])
def test_label_out_of_range_names_the_record(label, decode_once):
    source = labelled([0, 1, 2, label, 1, 0])
    arguments = {"transform": AsIs(), "batch_size": 6, "decode_once": decode_once}
    with pytest.raises(ValueError, match=rf"row 3: label {label} is outside 0..2"):
        next(train_batches(source, seed=0, **arguments))
    with pytest.raises(ValueError, match=rf"row 3: label {label} is outside 0..2"):
        list(eval_batches(source, **arguments))


@pytest.mark.parametrize("label", [1.5, None])
def test_a_label_that_is_no_whole_number_names_the_record(label):
    with pytest.raises(ValueError, match=rf"row 1: expected a whole number as label, found {label}"):
        list(eval_batches(labelled([0, label]), transform=AsIs(), batch_size=2))


def test_a_broken_iterator_stays_broken():
    batches = train_batches(labelled([0, 9]), transform=AsIs(), batch_size=1, seed=0, decode_once=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="label 9"):
            list(batches)


def test_pictures_of_two_sizes_name_the_record():
    class Grow(AsIs):
        def __call__(self, example, rng):
            return {**example, "image": np.zeros((1 + int(example["label"]), 1, 1), np.uint8)}

    with pytest.raises(ValueError, match=r"arrays:train\[1\] has shape .*resize or a crop"):
        list(eval_batches(numbered(2), transform=Grow(), batch_size=2))


def property_cases(count=25):
    """(examples of the whole set, first and last of the split, batch size, hosts, step of the restart)."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        process_count = int(rng.integers(1, 5))
        batch_size = process_count * int(rng.integers(1, 9))
        start = int(rng.integers(0, 20))
        stop = start + int(rng.integers(batch_size, 90))
        yield stop + int(rng.integers(0, 20)), start, stop, batch_size, process_count, int(rng.integers(0, 12))


@pytest.mark.parametrize("decode_once", [True, False])
@pytest.mark.parametrize("case", list(property_cases()))
def test_any_split_over_any_batch_and_any_hosts_is_covered(case, decode_once):
    """Joined over the hosts, steps [0, n) of training hold whole epochs of the split; an evaluation holds one."""
    total, start, stop, batch_size, process_count, start_step = case
    source = numbered(total, split=f"train[{start}:{stop}]")
    wanted = list(range(start, stop))
    settings = {"transform": AsIs(), "batch_size": batch_size, "num_threads": 1, "decode_once": decode_once}
    num_steps = start_step + 2 * len(wanted) // batch_size + 1

    def rows(num_hosts, first_step, steps):
        hosts = [
            train_batches(source, seed=7, start_step=first_step, process_index=i, process_count=num_hosts, **settings)
            for i in range(num_hosts)
        ]
        return [
            sorted(row for batch in step for row in rows_of(batch))
            for step in zip(*(take(host, steps) for host in hosts))
        ]

    # Begun on one host, resumed on several.
    steps = rows(1, 0, start_step) + rows(process_count, start_step, num_steps - start_step)
    assert steps == rows(1, 0, num_steps)
    in_order = take(train_batches(source, seed=7, **settings), num_steps)
    flat = [row for batch in in_order for row in rows_of(batch)]
    assert len(flat) >= 2 * len(wanted)
    for epoch in range(len(flat) // len(wanted)):
        assert sorted(flat[epoch * len(wanted) : (epoch + 1) * len(wanted)]) == wanted

    evaluated = [
        row
        for i in range(process_count)
        for batch in eval_batches(source, process_index=i, process_count=process_count, **settings)
        for row in rows_of(batch)
    ]
    assert sorted(evaluated) == wanted


def test_order_is_a_permutation_per_epoch_however_it_is_asked():
    order = Order(7, seed=3)
    rows = order(np.arange(21))
    epochs = rows.reshape(3, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert [order.row(position) for position in range(21)] == rows.tolist()
    np.testing.assert_array_equal(order(np.arange(5, 19, 2)), rows[5:19:2])
    assert Order(7, seed=4)(np.arange(21)).tolist() != rows.tolist()
    assert pickle.loads(pickle.dumps(order)).row(20) == rows[20]


def test_places_are_drawn_evenly():
    """Over many epochs each row comes to each place equally often: 2,000 epochs of 5 rows, five sigma."""
    counts = np.zeros((5, 5))
    for row, place in zip(Order(5, seed=0)(np.arange(10_000)).tolist(), itertools.cycle(range(5))):
        counts[row, place] += 1
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)


def test_augmentation_numbers_differ_between_epochs():
    batches = take(train_batches(numbered(6), transform=AddNoise(), batch_size=6, seed=0), 3)
    pixels = [{tuple(pixel) for pixel in batch["image"].reshape(6, 2).tolist()} for batch in batches]
    assert not pixels[0] & pixels[1] & pixels[2]


class Fails(Rows):
    """Some rows cannot be read."""

    def __init__(self, num_examples, bad):
        super().__init__([(np.full((1, 1, 2), row, np.uint8), row % 3) for row in range(num_examples)])
        self.bad = bad

    def __getitem__(self, index):
        if index in self.bad:
            raise DecodeError(f"row {index}", "it is torn") if index % 2 else FileNotFoundError(f"row {index} is gone")
        return super().__getitem__(index)


def values(batches, num_batches):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in take(batches, num_batches)]).tolist()


@pytest.mark.parametrize("decode_once", [True, False])
def test_bad_records_stop_training_by_default(decode_once):
    arguments = {"transform": AsIs(), "batch_size": 5, "decode_once": decode_once}
    with pytest.raises(DecodeError, match="cannot decode 'row 3': it is torn"):
        take(train_batches(Fails(10, {3}), seed=0, **arguments), 4)
    with pytest.raises(FileNotFoundError, match="row 4 is gone"):
        list(eval_batches(Fails(10, {4}), **arguments))


@pytest.mark.parametrize("decode_once", [True, False])
def test_skipped_records_are_replaced_in_training_and_counted(decode_once, caplog):
    arguments = {"transform": AsIs(), "batch_size": 5, "seed": 0, "decode_once": decode_once}
    batches = train_batches(Fails(10, {3, 4, 9}), on_error="skip", **arguments)
    found = values(batches, 4)
    complete = values(train_batches(Fails(10, set()), **arguments), 4)
    assert found == [{3: 5, 4: 5, 9: 0}.get(row, row) for row in complete]
    assert batches.skipped == {3: 2, 4: 2, 9: 2}
    assert batches.num_skipped == 6
    for row in (3, 4, 9):
        assert f"row {row}" in caplog.text
    assert "3 of 10 records of Rows are bad so far" in caplog.text


@pytest.mark.parametrize("decode_once", [True, False])
def test_skipped_records_are_masked_in_evaluation(decode_once):
    source = Fails(10, {0, 7})
    batches = iter(eval_batches(source, transform=AsIs(), batch_size=4, on_error="skip", decode_once=decode_once))
    rows = [row for batch in batches for row in batch["image"][batch["mask"]][:, 0, 0, 0].tolist()]
    assert rows == [1, 2, 3, 4, 5, 6, 8, 9]
    assert batches.skipped == {0: 1, 7: 1}


def test_an_operation_that_cannot_work_names_the_record():
    source = Rows([(np.zeros((height, 8, 3), np.uint8), 0) for height in (8, 8, 5)])
    transform = make_transform([{"op": "central_crop", "size_px": 6}])
    with pytest.raises(ValueError, match=r"row 2: central_crop needs 6 x 6 pixels"):
        list(eval_batches(source, transform=transform, batch_size=3))


def test_skipping_gives_up_where_everything_is_bad():
    with pytest.raises(ValueError, match=r"too many bad records in a row, none of 10 .*; the last: .*row 9"):
        train_batches(Fails(10, set(range(10))), transform=AsIs(), batch_size=5, seed=0, on_error="skip")


def test_a_bad_label_is_never_skipped():
    with pytest.raises(ValueError, match=r"row 3: label 5 is outside 0..2"):
        list(eval_batches(labelled([0, 1, 2, 5]), transform=AsIs(), batch_size=4, on_error="skip"))


def test_evaluation_refuses_random_transforms():
    with pytest.raises(ValueError, match="must not draw random numbers"):
        eval_batches(numbered(4), transform=AddNoise(), batch_size=4)


def test_an_operation_that_does_not_say_whether_it_is_random_is_named():
    class Posterize:
        def __call__(self, image, rng):
            return image

    transform = Transform(decode=Decode(), ops=(Posterize(),))
    for batches in (train_batches, eval_batches):
        with pytest.raises(AttributeError, match="'Posterize' object has no attribute 'random'"):
            batches(numbered(4), transform=transform, batch_size=2, **({"seed": 0} if batches is train_batches else {}))


def test_closing(recwarn):
    batches = train_batches(numbered(4), transform=AddNoise(), batch_size=4, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_make_data():
    arrays = {
        "train": (np.zeros((40, 6, 6, 3), np.uint8), np.arange(40) % 4),
        "test": (np.ones((9, 6, 6, 3), np.uint8), [3] * 9),
    }
    data = make_data(
        source={"name": "arrays", "arrays": arrays},
        train_split="train[:90%]",
        eval_split="test",
        batch_size=8,
        eval_batch_size=4,
        train_transforms=[{"op": "decode", "channels": 1}],
        eval_transforms=[],
        num_threads=1,
    )
    assert (data.num_classes, data.class_names, data.num_train) == (4, ("0", "1", "2", "3"), 36)
    batches = data.train(seed=0, start_step=3, process_index=1, process_count=2)
    assert next(batches)["image"].shape == (4, *data.image_shape) == (4, 6, 6, 1)
    batches.close()
    assert [int(batch["mask"].sum()) for batch in data.eval()] == [4, 4, 1]
    fingerprint = json.loads(json.dumps(data.fingerprint()))
    assert fingerprint.keys() == {"train"}  # another evaluation is no other run
    assert fingerprint["train"]["split"] == "train[:90%]"


def test_make_data_compares_the_classes(tmp_path):
    images = np.zeros((6, 4, 4, 3), np.uint8)
    np.savez(
        tmp_path / "a.npz", train_images=images, train_labels=np.arange(6), test_images=images, test_labels=[0] * 6
    )
    data = {
        "train_split": "train",
        "eval_split": "test",
        "batch_size": 2,
        "eval_batch_size": 2,
        "train_transforms": [],
        "eval_transforms": [],
    }
    assert make_data(source={"name": "arrays", "path": tmp_path / "a.npz"}, **data).num_classes == 6
    with pytest.raises(ValueError, match="unknown data source 'aray': did you mean 'arrays'"):
        make_data(source={"name": "aray"}, **data)
    with pytest.raises(ValueError, match=r"the source has no name\. Known: arrays, cifar10"):
        make_data(source={"path": tmp_path / "a.npz"}, **data)
    with pytest.raises(TypeError, match="num_worker"):
        make_data(source={"name": "arrays", "path": tmp_path / "a.npz"}, num_worker=2, **data)


def test_ahead_pairs_batches_with_what_was_skipped_in_them():
    source, arguments = Fails(10, {3, 4}), {"transform": AsIs(), "batch_size": 5, "seed": 0, "on_error": "skip"}
    expected = [int((batch["skipped"] >= 0).sum()) for batch in with_skipped(train_batches(source, **arguments), 6)]
    assert sum(expected) == 6  # two bad records in each of three epochs
    ahead = Ahead(train_batches(source, **arguments), put=lambda batch: batch["image"], count_skipped=True)
    found = []
    for _ in range(6):
        assert next(ahead).shape == (5, 1, 1, 2)
        found.append(ahead.counts)
    assert found == [{"skipped_records": count} for count in expected]
    strict = Ahead(train_batches(Fails(10, set()), **arguments), put=len, count_skipped=False)
    next(strict)
    assert strict.counts == {}


def with_skipped(batches, num_batches):
    """Batches as Grain delivers them."""
    return list(itertools.islice(batches._iterator[0], num_batches))


def test_ahead_raises_only_when_the_bad_batch_is_asked_for():
    arguments = {"transform": AsIs(), "batch_size": 1, "seed": 0, "decode_once": False, "num_threads": 1}
    order = [int(batch["image"][0, 0, 0, 0]) for batch in take(train_batches(Fails(10, set()), **arguments), 10)]
    step, bad = next((step, row) for step, row in enumerate(order) if step >= 4 and row)  # row 0 is read at the start
    ahead = Ahead(train_batches(Fails(10, {bad}), **arguments), put=len, count_skipped=False)
    assert [next(ahead) for _ in range(step)] == [3] * step
    for _ in range(2):
        with pytest.raises((DecodeError, FileNotFoundError), match=f"row {bad}"):
            next(ahead)
