import itertools

import numpy as np
import pytest

from vit_flax.data.pipeline import eval_batches, train_batches
from vit_flax.data.sources import Arrays


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


def numbered(num_examples, num_classes=3, labels=None):
    """Pictures that carry their own row number."""
    rows = np.arange(num_examples)
    images = np.stack([rows % 256, rows // 256], axis=-1).astype(np.uint8)[:, None, None, :]
    labels = rows % num_classes if labels is None else np.asarray(labels)
    return Arrays(split="train", arrays={"train": (images, labels)}, class_names=[str(c) for c in range(num_classes)])


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
    for seed in range(5):
        batches = take(train_batches(numbered(40), transform=AsIs(), batch_size=40, seed=seed), 5)
        orders |= {tuple(rows_of(batch)) for batch in batches}
    assert len(orders) == 25


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch(process_count):
    source, arguments = numbered(21), {"transform": AddNoise(), "batch_size": 8, "seed": 1}
    whole = take(train_batches(source, **arguments), 4)
    parts = [
        take(train_batches(source, process_index=i, process_count=process_count, **arguments), 4)
        for i in range(process_count)
    ]
    for step, batch in enumerate(whole):
        pixels = np.concatenate([part[step]["image"] for part in parts]).reshape(8, -1)
        assert sorted(map(bytes, pixels)) == sorted(map(bytes, batch["image"].reshape(8, -1)))


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
        ({"batch_size": 4, "decode_once": True, "transform": AddNoise()}, "random numbers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_batches(numbered(10), seed=0, **{"transform": AsIs(), **arguments})


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("decode_once", [True, False])
def test_label_out_of_range_names_the_record(label, decode_once):
    source = numbered(6, labels=[0, 1, 2, label, 1, 0])
    arguments = {"transform": AsIs(), "batch_size": 6, "decode_once": decode_once}
    with pytest.raises(ValueError, match=rf"arrays:train\[3\]: label {label} is outside 0..2"):
        next(train_batches(source, seed=0, **arguments))
    with pytest.raises(ValueError, match=rf"arrays:train\[3\]: label {label} is outside 0..2"):
        list(eval_batches(source, **arguments))


def test_a_broken_iterator_stays_broken():
    batches = train_batches(numbered(2, labels=[0, 9]), transform=AsIs(), batch_size=1, seed=0, decode_once=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="label 9"):
            list(batches)


def test_pictures_of_two_sizes_name_the_record():
    class Grow(AsIs):
        def __call__(self, example, rng):
            return {**example, "image": np.zeros((1 + int(example["label"]), 1, 1), np.uint8)}

    with pytest.raises(ValueError, match=r"arrays:train\[1\] has shape .*resize or a crop"):
        list(eval_batches(numbered(2), transform=Grow(), batch_size=2))
