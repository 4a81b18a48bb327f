"""Many experiments as one jitted program: points that differ only in numbers train side by side.

The states of the members are stacked on a leading axis `[m]`, and so are the numbers that differ (`config.HPARAMS` and
the seed); the batch is the same for all, so members share the data order. Each member computes what it computes alone:
the step that runs here is `Job.step`, the one of a solo run. Members are spread over the devices and share no
communication. On a device they go one after the other on a CPU (`lax.map`: its cores are busy with one) and side by
side elsewhere (`vmap`: one small model does not fill a GPU).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_flax import workdir as folders
from vit_flax.checkpoint import Checkpoints, Restored
from vit_flax.config import HPARAMS, ConfigError, flatten
from vit_flax.hooks import Every
from vit_flax.job import Job, build
from vit_flax.report import write_report
from vit_flax.signals import EXIT_PREEMPTED, Interrupted, StopSignal
from vit_flax.step import TrainState
from vit_flax.sweep.points import Point
from vit_flax.sweep.run import point_workdir, write_result
from vit_flax.train_log import TrainLog
from vit_flax.writer import Writer

SEED, DATA_SEED = "run.seed", "run.data_seed"


def program_of(config: Mapping[str, Any]) -> str:
    """What two points must have in common to be members of one program.

    A number that is off in one point and on in another makes two programs: what is off costs nothing, and is not there.
    """
    flat = flatten(config)
    for name in HPARAMS:
        if flat.get(name):
            flat[name] = "varies"
    if flat.get(DATA_SEED) is not None:
        flat[SEED] = "varies"
    return json.dumps(flat, sort_keys=True, default=str)


def group(points: Sequence[Point], max_members: int | None = None) -> list[list[Point]]:
    """The points as groups that are one program each, of at most `max_members`."""
    programs: dict[str, list[Point]] = {}
    for point in points:
        programs.setdefault(program_of(point.config), []).append(point)
    size = max_members or len(points)
    return [members[i : i + size] for members in programs.values() for i in range(0, len(members), size)]


def explain_single(points: Sequence[Point]) -> str | None:
    """Why points that differ in the seed are not members of one program; None if they are, or do not."""
    seeds = {flatten(point.config)[SEED] for point in points}
    if len(seeds) > 1 and any(flatten(point.config).get(DATA_SEED) is None for point in points):
        return (
            "Points with different run.seed see different batches and cannot share a program. "
            "Set run.data_seed in the base: then all see the same data order, alone too."
        )
    return None


def most_members(point: Point) -> int | None:
    """How many members like this one fit in the memory of the devices; None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in one for one in stats):
        return None
    limits = [one["bytes_limit"] for one in stats]
    job = build(point.config, devices=jax.devices()[:1])
    state = jax.eval_shape(job.init)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in next(iter(job.host_batches(0))).items()}
    memory: Any = jax.jit(job.step(), donate_argnums=0).lower(state, batch).compile().memory_analysis()
    one = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return max(1, math.floor(0.9 * min(limits) / one)) * len(limits)


def train_members(
    points: Sequence[Point],
    workdir: Path,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Trains a group of points as one program, and notes their results as `run_point` does.

    Args:
      points: of one group.
      workdir: of the sweep. The stacked state is kept in `groups/`; a member's folder gets what its solo run writes,
        with the last checkpoint.
      say: takes a line now and then.

    Raises:
      ConfigError: the points are not one program.
      SystemExit: after a signal to stop and a complete checkpoint; the same call goes on from there.
    """
    if len({program_of(point.config) for point in points}) > 1:
        raise ConfigError("These points differ in more than numbers and cannot be one program.")
    with StopSignal() as stop:
        jobs = [build(point.config, devices=jax.devices()[:1]) for point in points]
        run = _Run(jobs, points, workdir, stop, say)
        with folders.lock(run.folder), Checkpoints(str(run.folder / "checkpoints"), keep_last=1) as checkpoints:
            run.train(checkpoints)
    if stop.received:  # other groups may follow, also where this one is finished
        say(f"Stopped by {stop.received} after step {run.step}; the same command goes on from there.")
        raise SystemExit(EXIT_PREEMPTED)


@dataclass
class _Member:
    """What one member has of its own on the host."""

    point: Point
    job: Job
    folder: Path
    writer: Writer
    log: TrainLog
    found: dict[str, float]
    latest: dict[str, float]
    hooks: Mapping[str, Every]
    diverged: str | None

    @property
    def results(self) -> dict[str, float]:
        """The latest metrics."""
        return {**{f"train/{name}": value for name, value in self.log.last.items()}, **self.latest}


class _Run:
    """The training loop of a group."""

    def __init__(
        self,
        jobs: Sequence[Job],
        points: Sequence[Point],
        workdir: Path,
        stop: StopSignal,
        say: Callable[[str], None],
    ):
        self._job, self._jobs, self._points = jobs[0], jobs, points
        self._workdir, self._stop, self._say = workdir, stop, say
        self._total, self._log_every = self._job.run.total_steps, self._job.run.log_every_steps
        self._identity = {"members": [point.name for point in points], "program": program_of(points[0].config)}
        # By its members: a group that has lost one, or got one, is another program with checkpoints of its own.
        digest = hashlib.sha256(json.dumps(self._identity["members"]).encode()).hexdigest()[:8]
        self.folder = workdir / "groups" / f"{points[0].index:04d}-{len(points)}-{digest}"
        self.step, self._evaluated = 0, True  # whether the evaluations of this step, if any, are done
        count = len(points)
        devices = jax.devices()[: math.gcd(count, jax.device_count())]
        self._mesh = Mesh(np.asarray(devices), ("member",), axis_types=(AxisType.Auto,))
        self._cut = NamedSharding(self._mesh, PartitionSpec("member"))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())

    @property
    def finished(self) -> bool:
        return self.step == self._total and self._evaluated

    def train(self, checkpoints: Checkpoints) -> None:
        """Trains to the end or to a signal."""
        abstract = jax.eval_shape(self._init, *self._init_arguments(), {})
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._cut), abstract)
        restored = checkpoints.restore(target, identity=self._identity)
        if restored is None:
            init = jax.jit(self._init, out_shardings=self._cut)
            restored = Restored(0, init(*self._init_arguments(), self._job.pretrained()), {})
        self.step, states, progress = restored.step, restored.state, restored.progress
        with ExitStack() as writers:
            members = self._open(progress["members"] if progress else None, writers)
            self._evaluated = not progress or progress["evaluated"]
            self._stop.hold()
            self._loop(members, states, checkpoints)

    def _loop(self, members: Sequence[_Member], states: TrainState, checkpoints: Checkpoints) -> None:
        since = time.perf_counter()

        def save() -> None:
            progress = {"members": [self._progress(member) for member in members], "evaluated": self._evaluated}
            about = self._job.about()
            checkpoints.save(self.step, states, identity=self._identity, about=about, metrics={}, progress=progress)

        save_on_schedule = self._job.every("checkpoint", lambda *_: save())
        step_fn, batches = self._step_fn(), self._batches()
        interval: list[dict[str, jax.Array]] = []
        try:
            if not self._evaluated:
                self._evaluate(members, states, self._due(members))
            while self.step < self._total and not self._stop.received:
                states, metrics = step_fn(states, next(batches))
                self.step += 1
                for member in members:
                    member.log.begin()
                interval.append(metrics)
                due = self._due(members)
                if due or self.step % self._log_every == 0 or self.step == self._total:
                    self._distribute(members, interval)
                    interval = []
                for member in members:
                    member.found.clear()
                if due:
                    self._evaluate(members, states, due)
                save_on_schedule(self.step, states)
                checkpoints.check()
        except Interrupted:
            pass
        self._distribute(members, interval)
        if not self.finished:
            save()
        else:
            self._finish(members, states, time.perf_counter() - since)

    # The program.

    def _init_arguments(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys, hparams = zip(*(job.init_arguments() for job in self._jobs), strict=True)
        return jnp.stack(keys), jax.tree.map(lambda *values: jnp.stack(values), *hparams)

    def _init(self, keys: jax.Array, hparams: dict[str, jax.Array], pretrained: dict[str, Any]) -> TrainState:
        return jax.lax.map(lambda member: self._job.init_from(member[0], member[1], pretrained), (keys, hparams))

    def _step_fn(self) -> Callable[..., Any]:
        step = self._job.step()

        def on_a_device(states: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
            if jax.default_backend() == "cpu":
                return jax.lax.map(lambda state: step(state, batch), states)
            return jax.vmap(step, in_axes=(0, None))(states, batch)

        cut, everywhere = PartitionSpec("member"), PartitionSpec()
        spread = jax.shard_map(
            on_a_device, mesh=self._mesh, in_specs=(cut, everywhere), out_specs=(cut, cut), check_vma=False
        )
        return jax.jit(spread, donate_argnums=0)

    def _batches(self) -> Iterator[dict[str, jax.Array]]:
        for batch in self._job.host_batches(self.step):
            yield jax.device_put(batch, self._everywhere)

    # What each member writes.

    def _open(self, progress: Sequence[Mapping[str, Any]] | None, writers: ExitStack) -> list[_Member]:
        evaluations = self._job.evaluations(self._stop)  # compiled once for all members
        members = []
        for i, (point, job) in enumerate(zip(self._points, self._jobs, strict=True)):
            before = (
                progress[i] if progress else {"interval": {}, "last": {}, "latest": {}, "found": {}, "diverged": None}
            )
            folder = point_workdir(self._workdir, point)
            writers.enter_context(folders.lock(folder))  # the point may be running by itself
            folders.claim(folder, job.config, given=job.given)
            writer = writers.enter_context(job.writer(folder, start_step=self.step, quiet=True))
            log, found = job.train_log(writer, before["interval"], before["last"]), before["found"]
            hooks = job.evaluation_hooks(evaluations, writer, None, found)
            members.append(_Member(point, job, folder, writer, log, found, before["latest"], hooks, before["diverged"]))
        return members

    def _distribute(self, members: Sequence[_Member], interval: Sequence[dict[str, jax.Array]]) -> None:
        """Fetches the metrics of some steps of all members, and logs them."""
        fetched = jax.device_get(list(interval))
        for i, member in enumerate(members):
            for back, metrics in zip(range(len(fetched) - 1, -1, -1), fetched, strict=True):
                own = {name: values[i] for name, values in metrics.items()}
                in_a_row = int(own.pop("skipped_in_a_row"))
                if member.diverged is None:
                    member.log(self.step - back, own, 0.0)
                    if in_a_row >= member.job.run.max_skipped_steps:
                        member.diverged = f"{in_a_row} steps in a row, up to step {self.step - back}, were not finite"
                        self._say(f"{member.point.name} diverged: {member.diverged}; the others go on.")
            member.log.flush()  # the numbers are here: its time is that of these steps
        losses = [float(np.mean([m["loss"][i] for m in fetched])) for i, m in enumerate(members)] if fetched else []
        finite = [loss for loss in losses if math.isfinite(loss)]
        if self.step % self._log_every == 0 and finite:
            span = f"loss {min(finite):.4f} to {max(finite):.4f}"
            self._say(f"step {self.step}/{self._total}  {len(members)} members  {span}")

    def _due(self, members: Sequence[_Member]) -> list[str]:
        """The evaluations that are due, for all members by the clock of one."""
        hooks = next((member.hooks for member in members if member.diverged is None), {})
        return [name for name, hook in hooks.items() if hook.is_due(self.step)]

    def _evaluate(self, members: Sequence[_Member], states: TrainState, due: Sequence[str]) -> None:
        self._evaluated = False
        since = time.perf_counter()
        states = jax.device_put(states, self._everywhere) if self._mesh.size > 1 else states
        for i, member in enumerate(members):
            if member.diverged is None:
                state = _member_state(states, i)
                for name in due:
                    member.hooks[name].now(self.step, state)
                member.latest.update(member.found)
        for member in members:  # each waits for the evaluations of all
            member.log.exclude(time.perf_counter() - since)
        self._evaluated = True

    def _progress(self, member: _Member) -> dict[str, Any]:
        return {
            "interval": member.log.open_interval(),
            "last": member.log.last,
            "latest": dict(member.latest),  # copies: a thread writes them down while the loop goes on
            "found": dict(member.found),
            "diverged": member.diverged,
        }

    def _finish(self, members: Sequence[_Member], states: TrainState, secs: float) -> None:
        """Gives every member what its solo run would have written at its end, then its result.

        The results come last: members that have one are no longer of this group when the sweep is started again.
        """
        for i, member in enumerate(members):
            if member.diverged is not None:
                continue
            progress = self._progress(member) | {"evaluated": True}
            del progress["diverged"]
            with Checkpoints(str(member.folder / "checkpoints"), **member.job.checkpoint) as own:
                own.save(
                    self.step,
                    _member_state(states, i),
                    identity=member.job.identity(),
                    about=member.job.about(),
                    metrics=member.found,
                    progress=progress,
                )
            member.writer.finish(member.results)
            write_report(member.folder)
        for member in members:
            entries: dict[str, Any] = dict(status="done", step=self.step, metrics=member.results)
            if member.diverged is not None:
                entries = dict(status="failed", error=f"Diverged: {member.diverged}")
            write_result(member.folder, member.point, **entries, secs=secs)


def _member_state(states: TrainState, i: int) -> TrainState:
    device = jax.devices()[0]
    return jax.tree.map(lambda x: jax.device_put(x[i], device), states)
