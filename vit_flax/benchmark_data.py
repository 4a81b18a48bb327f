"""Images per second and core of the input pipeline, beside the pipelines that are installed with it.

    python -m vit_flax.benchmark_data [--images DIR] [--peers] [--prepared]

Every pipeline reads the same JPEG files, decodes, takes a random crop of area 8-100 % at 224 px, mirrors half of them
and delivers uint8 batches. Each runs in a process of its own; they take turns, so that a noisy machine hits all alike.
The unit is images per CPU second of the process and its workers: waiting does not count, so one number serves for any
number of cores as long as the pipeline scales. Prints one JSON line per pipeline and a Markdown table.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

SIZE_PX = 224
BATCH_SIZE = 64
REFERENCE = "vit_flax pillow bicubic"


def ours(files: list[str], threads: int, *, codec: str, filter: str) -> Iterator[Any]:
    """Batches of this project."""
    from vit_flax.data.pipeline import train_batches
    from vit_flax.data.transforms import make_transform

    transform = make_transform(our_ops(codec, filter))
    source: Any = Files(files)
    return train_batches(source, transform=transform, batch_size=BATCH_SIZE, seed=0, num_threads=threads)


def our_ops(codec: str, filter: str) -> list[dict[str, Any]]:
    """The transform as a config would write it."""
    crop = {"op": "inception_crop", "size_px": SIZE_PX, "filter": filter}
    return [{"op": "decode", "codec": codec}, crop, {"op": "flip"}]


class Files:
    """The files as a source; every label is 0."""

    class_names = ("any",)

    def __init__(self, files: list[str]):
        # Long enough that a batch never exceeds the split.
        self.files = files * math.ceil(4 * BATCH_SIZE / len(files))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Path(self.files[index]).read_bytes(), "label": 0, "id": self.files[index]}

    def fingerprint(self) -> dict[str, Any]:
        """See `vit_flax.data.sources.Source`."""
        return {"num_examples": len(self)}


def tf_data(files: list[str], threads: int, *, method: str, antialias: bool) -> Iterator[Any]:
    """tf.data with its fused decode and crop, and the same law of crops."""
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.threading.set_intra_op_parallelism_threads(threads)

    def load(path):
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        height, width = shape[0], shape[1]
        pixels = tf.cast(height * width, tf.float32) * tf.random.uniform([10], 0.08, 1.0)
        ratio = tf.exp(tf.random.uniform([10], math.log(3 / 4), math.log(4 / 3)))
        wide = tf.cast(tf.round(tf.sqrt(pixels * ratio)), tf.int32)
        tall = tf.cast(tf.round(tf.sqrt(pixels / ratio)), tf.int32)
        first = tf.argmax(tf.cast((wide <= width) & (tall <= height), tf.int32))
        wide, tall = tf.minimum(wide[first], width), tf.minimum(tall[first], height)
        top = tf.random.uniform([], 0, height - tall + 1, tf.int32)
        left = tf.random.uniform([], 0, width - wide + 1, tf.int32)
        image = tf.io.decode_and_crop_jpeg(data, tf.stack([top, left, tall, wide]), channels=3)
        image = tf.image.resize(image, (SIZE_PX, SIZE_PX), method, antialias=antialias)
        return tf.cast(tf.clip_by_value(tf.image.random_flip_left_right(image), 0, 255), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    batches = data.map(load, num_parallel_calls=threads).batch(BATCH_SIZE, drop_remainder=True).prefetch(1)
    return batches.as_numpy_iterator()


def torch_data(files: list[str], threads: int, *, filter: str, workers: bool) -> Iterator[Any]:
    """A torch DataLoader over Pillow images, doing what torchvision's transforms do; uint8, not normalised."""
    import torch

    torch.set_num_threads(1)
    sampler = torch.utils.data.RandomSampler(files, replacement=True, num_samples=10**6)
    return iter(
        torch.utils.data.DataLoader(
            _TorchFiles(files, filter), BATCH_SIZE, sampler=sampler, num_workers=threads if workers else 0
        )
    )


class _TorchFiles:
    """Full decode, RandomResizedCrop, RandomHorizontalFlip, and a uint8 tensor [c, h, w]."""

    def __init__(self, files: list[str], filter: str):
        self.files, self.filter = files, filter

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        from vit_flax.data.geometry import FILTERS, area_uniform_box

        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        box = area_uniform_box(*image.size, (0.08, 1.0), (3 / 4, 4 / 3), rng)
        image = image.crop(box).resize((SIZE_PX, SIZE_PX), FILTERS[self.filter])
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# Name -> (module that must be installed, what makes its batches, its arguments).
PIPELINES: dict[str, tuple[str, Callable[..., Iterator[Any]], dict[str, Any]]] = {
    "vit_flax pillow bilinear": ("PIL", ours, {"codec": "pillow", "filter": "bilinear"}),
    REFERENCE: ("PIL", ours, {"codec": "pillow", "filter": "bicubic"}),
    "vit_flax opencv area": ("cv2", ours, {"codec": "opencv", "filter": "area"}),
}
PEERS: dict[str, tuple[str, Callable[..., Iterator[Any]], dict[str, Any]]] = {
    "tf.data bicubic antialias": ("tensorflow", tf_data, {"method": "bicubic", "antialias": True}),
    "tf.data bilinear antialias": ("tensorflow", tf_data, {"method": "bilinear", "antialias": True}),
    "tf.data bilinear aliased": ("tensorflow", tf_data, {"method": "bilinear", "antialias": False}),
    "torch DataLoader bicubic": ("torch", torch_data, {"filter": "bicubic", "workers": True}),
    "torch DataLoader bilinear": ("torch", torch_data, {"filter": "bilinear", "workers": True}),
    "torch in process bicubic": ("torch", torch_data, {"filter": "bicubic", "workers": False}),
    "torch in process bilinear": ("torch", torch_data, {"filter": "bilinear", "workers": False}),
}


def main(argv: list[str]) -> None:
    """Measures and reports, or, started by `measure`, runs one pipeline."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    given = flags.FLAGS
    if given.child:
        serve(given.child, json.loads(sys.stdin.readline()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        files = find_images(given.images) if given.images else make_photographs(Path(scratch), count=64)
        runs = [(name, name, files) for name in installed({**PIPELINES, **(PEERS if given.peers else {})})]
        if given.prepared:
            small = prepare(files, Path(scratch) / "prepared")
            runs += [(f"{name}, prepared 256 px", name, small) for name in installed(PIPELINES)]
        rates = measure(runs, rounds=given.rounds, batches=given.batches, threads=given.threads)
        differences = {name: difference(files, PIPELINES[name][2]) for name in installed(PIPELINES)}
        report(rates, differences, files)


def installed(pipelines: dict[str, Any]) -> list[str]:
    """The names whose library can be imported; says which cannot."""
    import importlib.util

    found = [name for name, (module, *_) in pipelines.items() if importlib.util.find_spec(module)]
    for name in sorted(pipelines.keys() - found):
        print(f"left out, {pipelines[name][0]} is not installed: {name}", file=sys.stderr)
    return found


def measure(
    runs: list[tuple[str, str, list[str]]], *, rounds: int, batches: int, threads: int
) -> dict[str, list[dict[str, float]]]:
    """Images per CPU second and per second, one entry per round, of each (label, pipeline, files).

    Starts one process per pipeline, and lets them take turns.
    """
    children = {}
    rates: dict[str, list[dict[str, float]]] = {label: [] for label, *_ in runs}
    try:
        for label, name, files in runs:
            command = [sys.executable, "-m", "vit_flax.benchmark_data", "--child", name]
            children[label] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            _ask(children[label], {"files": files, "threads": threads})
        for _ in range(rounds):
            for label in children:
                rates[label].append(_ask(children[label], {"batches": batches}))
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return rates


def _ask(child: subprocess.Popen, request: dict[str, Any]) -> dict[str, float]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(request) + "\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        raise RuntimeError(f"a pipeline ended with exit code {child.wait()}; its message is above")
    return json.loads(answer)


def serve(name: str, setting: dict[str, Any]) -> None:
    """The child's side: answers every request on stdin with one measurement on stdout."""
    _, make, arguments = {**PIPELINES, **PEERS}[name]
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        batches: Any = make(setting["files"], setting["threads"], **arguments)
        for _ in range(3):  # until the work in flight is the same at both ends of the interval
            next(batches)
        cpu, wall = cpu_seconds(), time.perf_counter()
        count = json.loads(line)["batches"]
        for _ in range(count):
            batch = next(batches)
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        images = batch["image"] if isinstance(batch, dict) else batch
        if sorted(images.shape) != sorted((BATCH_SIZE, SIZE_PX, SIZE_PX, 3)) or "uint8" not in str(images.dtype):
            raise RuntimeError(f"{name} delivered {images.dtype} {tuple(images.shape)}")
        getattr(batches, "close", lambda: None)()  # ours; the others stop when they are dropped
        del batches
        rate = {"per_cpu_second": count * BATCH_SIZE / cpu, "per_second": count * BATCH_SIZE / wall}
        print(json.dumps(rate), file=answers, flush=True)


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and the worker processes it has now (these on Linux only)."""
    total = time.process_time()
    if not Path("/proc/self/stat").exists():
        return total
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # fields 3 and on, after the name
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == os.getpid():
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def difference(files: list[str], arguments: dict[str, Any]) -> float:
    """Mean difference, in grey levels, to antialiased bicubic at full resolution, with the same crops."""
    from vit_flax.data.transforms import make_transform

    exact = make_transform([{"op": "flip", "prob": 0.0}, *our_ops("pillow", "bicubic")[1:]])  # decoded in full
    transform = make_transform(our_ops(**arguments))
    source = Files(files)
    differences = []
    for index in range(len(files)):
        pair = []
        for f, skip in ((transform, 0), (exact, 1)):
            rng = np.random.default_rng(index)
            if skip == 0:
                rng.random()  # `exact` has spent one number on its first operation
            pair.append(f(source[index], rng)["image"].astype(np.float64))
        differences.append(np.abs(pair[0] - pair[1]).mean())
    return float(np.mean(differences))


def find_images(directory: str) -> list[str]:
    """The JPEG files below a folder."""
    files = sorted(str(p) for p in Path(directory).expanduser().rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise app.UsageError(f"--images={directory} holds no .jpg or .jpeg file")
    return files


def make_photographs(directory: Path, count: int) -> list[str]:
    """Writes JPEGs with the size (500 x 375), the spectrum and the weight (about 140 KB) of web photographs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    files = []
    for index in range(count):
        width, height = (500, 375) if index % 4 else (375, 500)
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]) + 1 / width
        channels = []
        for _ in range(3):
            noise = np.fft.fft2(rng.normal(size=(height, width))) / frequency
            channels.append(np.real(np.fft.ifft2(noise)))
        pixels = np.stack([channels[0] + 0.25 * c for c in channels], axis=-1)  # natural channels go together
        pixels = 128 + 60 * pixels / pixels.std()
        path = directory / f"{index:03d}.jpg"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=92)
        files.append(str(path))
    return files


def prepare(files: list[str], directory: Path) -> list[str]:
    """Writes copies as `python -m vit_flax.data.prepare --short_side_px 256` stores them."""
    from vit_flax.data.prepare import encode_picture

    directory.mkdir()
    copies = []
    for index, file in enumerate(files):
        copy = directory / f"{index}.jpg"
        copy.write_bytes(encode_picture(Path(file).read_bytes(), file, short_side_px=256, quality=90))
        copies.append(str(copy))
    return copies


def report(rates: dict[str, list[dict[str, float]]], differences: dict[str, float], files: list[str]) -> None:
    """Prints a JSON line per pipeline, then the table."""
    median = {label: statistics.median(r["per_cpu_second"] for r in rounds) for label, rounds in rates.items()}
    sizes = [os.path.getsize(file) for file in files]
    num_rounds = len(next(iter(rates.values())))
    print(f"\n{len(files)} files, {statistics.mean(sizes) / 1000:.0f} KB on average; {num_rounds} rounds\n")
    table = [
        "| pipeline | images / CPU s | low - high | ratio | images / s | differs by |",
        "|---|---|---|---|---|---|",
    ]
    for label, rounds in rates.items():
        per_cpu = sorted(r["per_cpu_second"] for r in rounds)
        row = {
            "pipeline": label,
            "images_per_cpu_second": round(median[label], 1),
            "low": round(per_cpu[0], 1),
            "high": round(per_cpu[-1], 1),
            "ratio": round(median[label] / median[REFERENCE], 3),
            "images_per_second": round(statistics.median(r["per_second"] for r in rounds), 1),
            "grey_levels_from_bicubic": round(differences[label], 2) if label in differences else None,
        }
        print(json.dumps(row))
        cells = [str(value) if value is not None else "" for value in row.values()]
        table.append("| " + " | ".join([*cells[:2], f"{cells[2]} - {cells[3]}", *cells[4:]]) + " |")
    print("\n".join(["", f"Ratio: to {REFERENCE}, on the files as they are.", "", *table]))


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "Folder of JPEG files, searched through; none: photographs are made up.")
    flags.DEFINE_bool("peers", False, "Measure tf.data and torch as well, where they are installed.")
    flags.DEFINE_bool("prepared", False, "Measure ours on copies with a short side of 256 px as well.")
    flags.DEFINE_integer("rounds", 5, "Turns per pipeline; the median is reported.", lower_bound=1)
    flags.DEFINE_integer("batches", 12, "Batches of 64 images measured per turn.", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "Threads (torch: worker processes) of each pipeline.", lower_bound=1)
    flags.DEFINE_string("child", None, "Internal: the pipeline that this process runs.")
    app.run(main)
