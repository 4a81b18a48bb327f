"""Kills, signals, full disks and flipped bits: what a run survives, tried out on this machine in minutes.

    python -m vit_flax.reliability                           # everything; exit status 1 if a promise is broken
    python -m vit_flax.reliability --only kills --times 20

Every run is `python -m vit_flax.main` on a very small model, in a process of its own (`vit_flax/lives.py`).
docs/reliability.md has the figures.
"""

import argparse
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax.checkpoint import Checkpoints
from vit_flax.lives import Life, Lives, Reference, changed, keep_compiled_programs, small_config
from vit_flax.models.vit import ViT
from vit_flax.optim import make_optimizer
from vit_flax.signals import EXIT_PREEMPTED
from vit_flax.step import TrainState, init_state

TOTAL_STEPS = 240

Row = tuple[str, str, bool]  # what was tried, what happened, whether the promise held


def kills(lives: Lives, reference: Reference, rng: random.Random, count: int) -> Iterator[Row]:
    """SIGKILL at random moments: a quarter of them during the start, half of them inside a save."""
    done = exact = partial = in_save = in_deletion = before_first = ends = exact_ends = 0
    while done < count:
        ends += 1
        workdir = lives.folder / f"killed_{ends}"
        while True:
            life = lives.start(workdir, reference.config)
            if done < count:
                _kill(life, workdir, rng, during_start=done % 4 == 0, inside_a_save=done % 4 > 1)
            code = life.end()
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise RuntimeError(f"A run that was killed and started again ended with {code}:\n{life.last_words()}")
            done += 1
            in_save += _saving(workdir)
            in_deletion += any(not (path / "record" / "record").exists() for path in _step_folders(workdir))
            found = reference.read(workdir)
            before_first += found is None
            partial += found is not None and found[2] > 0
            exact += found is None or found[1]
        exact_ends += reference.is_end_of(workdir)
    yield (
        f"SIGKILL {done} times: {in_save} inside a save, {in_deletion} inside a deletion, {before_first} before the "
        "first checkpoint",
        f"{exact} exact resumes; {partial} partial checkpoints listed as the newest",
        exact == done and partial == 0,
    )
    yield f"the {ends} runs that were killed", f"{exact_ends} ended with equal bits and metrics", exact_ends == ends


def _kill(life: Life, workdir: Path, rng: random.Random, *, during_start: bool, inside_a_save: bool) -> None:
    if during_start:
        time.sleep(rng.uniform(0, 2))
    else:
        life.wait_until(lambda: life.said("step "))
        time.sleep(rng.uniform(0, 0.5))
    if inside_a_save:
        life.wait_until(lambda: _saving(workdir))
        time.sleep(rng.uniform(0, 0.1))
    life.send(signal.SIGKILL)


def _saving(workdir: Path) -> bool:
    return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))


def _step_folders(workdir: Path) -> list[Path]:
    return [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def signals(lives: Lives, reference: Reference, rng: random.Random, count: int) -> Iterator[Row]:
    """SIGTERM and SIGINT at random moments after the first step; and during the start."""
    done = saved = exact = ends = exact_ends = 0
    codes, secs = set[int](), list[float]()
    while done < count:
        ends += 1
        workdir = lives.folder / f"stopped_{ends}"
        while True:
            life = lives.start(workdir, changed(reference.config, checkpoint__every_steps=None))
            stopping = done < count  # else the run may end in peace
            if stopping:
                life.wait_until(lambda life=life: life.said("step "))
                time.sleep(rng.uniform(0, 0.2))
            since = time.monotonic()
            if stopping:
                life.send((signal.SIGTERM, signal.SIGINT)[done % 2])
            code = life.end()
            if not stopping or (code != EXIT_PREEMPTED and reference.is_end_of(workdir)):  # it came too late
                break
            done += 1
            codes.add(code)
            secs.append(time.monotonic() - since)
            found = reference.read(workdir)
            saved += found is not None and life.said(f"after step {found[0]};")
            exact += found is not None and found[1]
        exact_ends += reference.is_end_of(workdir)
    yield (
        f"SIGTERM or SIGINT {done} times after the first step",
        f"{saved} saved that step, {exact} with the right bits; exit codes {sorted(codes)}; "
        f"{max(secs):.1f} s or less from the signal to the exit",
        saved == exact == done and codes == {EXIT_PREEMPTED},
    )
    yield f"the {ends} runs that were stopped", f"{exact_ends} ended with equal bits and metrics", exact_ends == ends
    early = []
    for _ in range(count // 4):
        life = lives.start(lives.folder / "early", changed(reference.config, checkpoint__every_steps=None))
        time.sleep(rng.uniform(0, 1))
        life.send(signal.SIGTERM)
        early.append(life.end())
        shutil.rmtree(lives.folder / "early", ignore_errors=True)
    # The very first moment belongs to Python, which has no handler yet.
    fine = all(code in (EXIT_PREEMPTED, -signal.SIGTERM) for code in early)
    yield f"SIGTERM {len(early)} times during the start", f"exit codes {sorted(set(early))}", fine


def disk_full(lives: Lives, reference: Reference, rng: random.Random, count: int) -> Iterator[Row]:
    """A file system that a save fills: the run stops, or goes on, as configured; earlier checkpoints stay whole."""
    del rng, count
    workdir = lives.folder / "full"
    with small_file_system(workdir / "checkpoints", num_kib=4096) as place:
        if place is None:
            yield "disk full during a save", "not run: mounting a small file system needs permissions", True
            return
        filler = place / "filler"
        config = changed(reference.config, checkpoint__keep_every_steps=5)  # keeps all, so that it gets full
        life = lives.start(workdir, config)
        code = life.end()
        found = reference.read(workdir)
        said = life.said("No space left on device") and life.said("could not be written")
        yield (
            "disk full during a save, on_error='stop'",
            f"exit code {code}, {'clear' if said and not life.said('Traceback') else 'UNCLEAR'} error; newest "
            f"checkpoint {found and found[0]} {'whole' if found and found[1:] == (True, 0) else 'DAMAGED'}",
            code == 2 and said and not life.said("Traceback") and found is not None and found[1:] == (True, 0),
        )
        for path in sorted(_step_folders(workdir), key=lambda path: int(path.name))[:-2]:
            shutil.rmtree(path)
        resumed = lives.start(workdir, reference.config).end() == 0 and reference.is_end_of(workdir)
        yield "  space made, the same command again", "equal bits and metrics" if resumed else "DIFFERS", resumed

        _empty(workdir)
        filler.write_bytes(bytes(shutil.disk_usage(place).free - 2**16))
        life = lives.start(workdir, changed(reference.config, checkpoint__on_error="continue"))
        life.wait_until(lambda: life.said("The run goes on"))
        filler.unlink()
        went_on = life.end() == 0 and life.said("The run goes on") and reference.is_end_of(workdir)
        text = "went on; equal bits and metrics" if went_on else "FAILED"
        yield "  on_error='continue', space made meanwhile", text, went_on

        _empty(workdir)
        filler.write_bytes(bytes(shutil.disk_usage(place).free - 2**16))
        life = lives.start(workdir, changed(reference.config, checkpoint__on_error="continue"))
        code = life.end()
        yield "  on_error='continue', full until the end", f"exit code {code}", code == 2


def _empty(workdir: Path) -> None:
    """Makes the workdir a new one, but leaves the file system that is mounted in it."""
    for name in ("config.json", "metrics.jsonl", "report.html"):
        (workdir / name).unlink(missing_ok=True)
    for path in (workdir / "checkpoints").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def small_file_system(place: Path, *, num_kib: int) -> Iterator[Path | None]:
    """A file system of so many KiB in memory; None where that is not permitted."""
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)


def damage(lives: Lives, reference: Reference, rng: random.Random, count: int) -> Iterator[Row]:
    """A flipped bit, or a file cut short, at a random place of the checkpoints of a finished run."""
    older = same = wrong = refused = 0
    original, workdir = reference.workdir / "checkpoints", lives.folder / "damaged"
    for number in range(count):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(original, workdir / "checkpoints")
        newest = max(_step_folders(workdir), key=lambda path: int(path.name))
        damage_one_file(newest, rng, truncate=number % 3 == 2)
        try:
            found = reference.read(workdir)
        except OSError:
            refused += 1
            continue
        assert found is not None
        step, right, _ = found
        wrong += not right
        same += right and step == int(newest.name)
        older += right and step != int(newest.name)
    yield (
        f"{count - count // 3} flipped bits and {count // 3} files cut short in the newest checkpoint",
        f"{older} times the one before was used, {same} times the damage did not touch what is read; "
        f"{wrong} wrong states, {refused} refused",
        wrong == refused == 0,
    )


def damage_one_file(folder: Path, rng: random.Random, *, truncate: bool) -> Path:
    """Flips one bit of a file anywhere below a folder, or cuts the file short; returns which.

    Half of the times every file is equally likely, and half of the times every byte.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    [file] = rng.choices(files, weights=rng.choice(([1] * len(files), [path.stat().st_size for path in files])))
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    if truncate:
        del data[place:]
    else:
        data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return file


def save_time(lives: Lives, reference: Reference, rng: random.Random, count: int) -> Iterator[Row]:
    """How long an asynchronous save of ViT-S/16 with AdamW and a moving average holds up the loop."""
    del reference, rng
    state = _s16_state()
    leaves = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    num_mb = sum(x.nbytes for x in leaves) / 1e6
    for compress in (True, False):
        blocked, whole, copied = [], [], []
        folder = lives.folder / f"speed_{compress}"
        with Checkpoints(str(folder), compress=compress) as checkpoints:
            for step in range(count + 1):
                since = time.perf_counter()
                checkpoints.save(step, state, identity={})
                blocked.append(time.perf_counter() - since)
                checkpoints.wait()
                whole.append(time.perf_counter() - since)
                since = time.perf_counter()
                for leaf in leaves:
                    np.array(leaf)
                copied.append(time.perf_counter() - since)
        shutil.rmtree(folder)
        blocked, whole, copied = (sorted(secs[1:]) for secs in (blocked, whole, copied))  # the first one compiles
        middle = count // 2
        yield (
            f"save of ViT-S/16, {num_mb:.0f} MB, compress={compress}, {count} times",
            f"blocks {1e3 * blocked[0]:.0f} ms at best, {1e3 * blocked[middle]:.0f} ms median (copying the state in "
            f"memory: {1e3 * copied[0]:.0f} and {1e3 * copied[middle]:.0f} ms); on disk after {whole[middle]:.1f} s",
            True,  # a speed is no promise
        )


def _s16_state() -> TrainState:
    model, image = ViT.from_variant("S/16", num_classes=1000), jnp.zeros((1, 224, 224, 3))
    optimizer = make_optimizer(
        name="adamw", lr=1e-3, weight_decay=0.1, schedule="constant", warmup_steps=0, total_steps=1
    )

    def init() -> TrainState:
        return init_state(
            jax.random.key(0),
            init=lambda key: model.init(key, image, train=False)["params"],
            optimizer=lambda _: optimizer,
            hparams={"run.ema_decay": jnp.float32(0.999)},
        )

    return jax.block_until_ready(jax.jit(init)())


TRIALS: dict[str, tuple[Callable[..., Iterator[Row]], int]] = {
    "kills": (kills, 100),
    "signals": (signals, 20),
    "disk_full": (disk_full, 1),
    "damage": (damage, 60),
    "save_time": (save_time, 10),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vit_flax.reliability", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="trials to run")
    parser.add_argument("--times", type=int, help="how often, instead of the number of each trial")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    arguments = parser.parse_args(argv)
    broken = 0
    with tempfile.TemporaryDirectory(prefix="vit_flax_reliability_") as folder:
        keep_compiled_programs(Path(folder) / "xla")
        lives = Lives(Path(folder))
        reference = Reference(lives, small_config(TOTAL_STEPS))
        for name in arguments.only:
            trial, times = TRIALS[name]
            since = time.monotonic()
            for tried, happened, held in trial(
                lives, reference, random.Random(arguments.seed), arguments.times or times
            ):
                print(f"{'ok ' if held else 'BAD'} {tried}: {happened}", flush=True)
                broken += not held
            print(f"    {name}: {time.monotonic() - since:.0f} s", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
