"""One case: a model, a batch and a way to run it, compiled; calling it runs it a number of times."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_flax import sharding
from vit_flax.benchmark.measure import LeftOut
from vit_flax.losses import softmax_xent
from vit_flax.models import ViT
from vit_flax.models.flops import forward_flops
from vit_flax.optim import make_optimizer
from vit_flax.step import TrainState, classification, init_state, train_step

MODES = ("forward", "train", "loop")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      variant: a name such as "S/16".
      batch: images per step.
      mode: "forward"; "train", the jitted step on a batch that lies on the device; or "loop", the step with uint8
        batches that come from the host, one ahead, and metrics that are fetched one step late.
      dtype: "float32" or "bfloat16".
      attention: a key of `models.attend.IMPLEMENTATIONS`.
      layers: "auto", as the model has it by default; "scan", block by block; "loop"; or the number of blocks that one
        turn of the scan holds.
      remat: "auto" or a key of `models.encoder.REMAT`.
      image_px: side of the square image.
      num_classes: of the head.
      depth: number of blocks; None for the variant's own.
      library: "vit_flax", or a key of `peers.PEERS`, for which attention, layers and remat mean nothing.
    """

    variant: str
    batch: int
    mode: str
    dtype: str
    attention: str = "auto"
    layers: str = "auto"
    remat: str = "auto"
    image_px: int = 224
    num_classes: int = 1000
    depth: int | None = None
    library: str = "vit_flax"

    @property
    def name(self) -> str:
        """What tells this case from the others, in one line."""
        own = f" {self.attention} {self.layers} remat={self.remat}" if self.library == "vit_flax" else ""
        depth = "" if self.depth is None else f" depth {self.depth}"
        return f"{self.library} {self.variant}{depth} b{self.batch} {self.dtype} {self.mode}{own}"

    def model(self) -> ViT:
        """The model."""
        fields: dict[str, Any] = {} if self.depth is None else {"depth": self.depth}
        scan = self.layers != "loop"
        unroll = {"auto": None, "loop": None, "scan": 1}
        return ViT.from_variant(
            self.variant,
            num_classes=self.num_classes,
            dtype=self.dtype,
            attention_impl=self.attention,
            scan=scan,
            scan_unroll=unroll[self.layers] if self.layers in unroll else int(self.layers),
            remat=self.remat,
            **fields,
        )

    def check(self) -> None:
        """Raises ValueError for a choice that the model does not know, or images that do not fit; computes nothing."""
        image = jax.ShapeDtypeStruct((1, self.image_px, self.image_px, 3), jnp.float32)
        jax.eval_shape(partial(self.model().init, train=False), jax.random.key(0), image)

    def flops(self) -> float:
        """Floating-point operations per call, see `models.flops.forward_flops`; a training step counts as three."""
        model = self.model()
        rows, columns = (self.image_px // side for side in model.patch_shape)
        flops = forward_flops(model, (rows, columns), as_published=self.library != "vit_flax")
        return flops * self.batch * (1 if self.mode == "forward" else 3)


class Ours:
    """A compiled case of this project; see `measure.Runner`. Between its turns it holds no arrays.

    Raises: LeftOut: it does not fit into the memory.
    """

    def __init__(self, case: Case):
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        since = time.perf_counter()
        with left_out_if_too_large(case):
            self.program, self._begin = (_forward if case.mode == "forward" else _train)(case, mesh)
        self._case, self.compile_seconds = case, time.perf_counter() - since

    def run(self, steps: int) -> float:
        """Does a step, then so many steps and waits for the last one; returns the seconds of these."""
        with left_out_if_too_large(self._case):
            call = self._begin()
            call(1)  # memory is allocated, and what others have left in the caches goes
            since = time.perf_counter()
            call(steps)
            return time.perf_counter() - since

    def memory_bytes(self) -> int:
        """Arguments, results and temporary buffers of the program; donated ones count once."""
        return program_bytes(self.program)


@contextlib.contextmanager
def left_out_if_too_large(case: Case) -> Iterator[None]:
    """Turns an error about too little memory into a LeftOut."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise LeftOut(f"{case.name} does not fit into the memory") from error


def program_bytes(program: Any) -> int:
    """Memory of a compiled program while it runs."""
    m = program.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def _pixels(case: Case, mesh: jax.sharding.Mesh) -> jax.Array:
    rng = np.random.default_rng(0)
    shape = (case.batch, case.image_px, case.image_px, 3)
    return jax.device_put(rng.standard_normal(shape, np.float32), sharding.batch_sharding(mesh))


def _host_batches(case: Case) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    batches = [
        {
            "image": rng.integers(0, 256, (case.batch, case.image_px, case.image_px, 3), np.uint8),
            "label": rng.integers(0, case.num_classes, case.batch, np.int32),
            "mask": np.ones(case.batch, bool),
        }
        for _ in range(2)
    ]
    return itertools.cycle(batches)


def _forward(case: Case, mesh: jax.sharding.Mesh) -> tuple[Any, Callable[[], Callable[[int], None]]]:
    model = case.model()
    shape = (case.image_px, case.image_px, 3)
    init = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)["params"])
    pixels = jax.ShapeDtypeStruct((case.batch, *shape), jnp.float32, sharding=sharding.batch_sharding(mesh))
    program = compile_forward(case).lower(jax.eval_shape(init), pixels).compile()

    def begin() -> Callable[[int], None]:
        params, x = init(), _pixels(case, mesh)

        def call(steps: int) -> None:
            for _ in range(steps):
                y = program(params, x)
            y.block_until_ready()

        return call

    return program, begin


def compile_forward(case: Case) -> Any:
    """The jitted `(params, pixels) -> logits`."""
    model = case.model()
    return jax.jit(lambda params, x: model.apply({"params": params}, x, train=False)[0])


def train_program(case: Case) -> tuple[Callable[[], TrainState], Any]:
    """Makes the initial state, and the jitted step that consumes it: AdamW on softmax cross-entropy."""
    model = case.model()
    objective = partial(
        classification,
        apply=lambda variables, x, hparams, **kwargs: model.apply(variables, x, **kwargs),  # pyright: ignore
        augment=lambda key, images, targets, hparams: (images.astype(jnp.float32) / 127.5 - 1.0, targets),
        loss=lambda logits, targets, mask, hparams: softmax_xent(logits, targets, mask),
        num_classes=case.num_classes,
    )

    def optimizer(hparams: dict) -> Any:
        return make_optimizer(name="adamw", lr=1e-3, weight_decay=0.05, total_steps=10**6, clip_norm=1.0)

    def init() -> TrainState:
        image = jnp.zeros((1, case.image_px, case.image_px, 3))
        return init_state(
            jax.random.key(0),
            init=lambda key: model.init(key, image, train=False)["params"],
            optimizer=optimizer,
            hparams={},
        )

    return init, jax.jit(partial(train_step, objective=objective, optimizer=optimizer), donate_argnums=0)


def _train(case: Case, mesh: jax.sharding.Mesh) -> tuple[Any, Callable[[], Callable[[int], None]]]:
    make, step = train_program(case)
    init = jax.jit(make)
    put = partial(sharding.put_batch, mesh=mesh, global_batch_size=case.batch)
    program = step.lower(jax.eval_shape(init), put(next(_host_batches(case)))).compile()

    def begin() -> Callable[[int], None]:
        host = _host_batches(case)
        state, fixed = init(), put(next(host))

        def call(steps: int) -> None:
            nonlocal state
            if case.mode == "train":
                for _ in range(steps):
                    state, metrics = program(state, fixed)
                jax.block_until_ready(state.step)
                return
            ahead, late = put(next(host)), None
            for _ in range(steps):
                batch, ahead = ahead, put(next(host))
                state, metrics = program(state, batch)
                if late is not None:
                    jax.device_get(late)
                late = metrics
            jax.device_get(late)

        return call

    return program, begin
