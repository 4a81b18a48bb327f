"""The same case in other libraries, where they are installed; each in a process of its own that takes its turn.

A process holds one peer: libraries bring thread pools and allocators of their own, and a peer that waits on its
standard input costs nothing.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_flax.benchmark.cases import Case
from vit_flax.benchmark.measure import LeftOut
from vit_flax.models import variants

Call = tuple[Callable[[], Any], Callable[[], Any]]  # starts a step, and waits for all that were started


def timm(case: Case, *, compiled: bool) -> Call:
    """The VisionTransformer of timm with scaled_dot_product_attention, eager or through torch.compile."""
    from timm.models.vision_transformer import VisionTransformer

    size = variants.parse(case.variant)
    model = VisionTransformer(
        img_size=case.image_px,
        patch_size=size["patch_size"],
        embed_dim=size["width"],
        depth=case.depth or size["depth"],
        num_heads=size["num_heads"],
        mlp_ratio=size["mlp_dim"] / size["width"],
        num_classes=case.num_classes,
    )
    return _torch(case, model, compiled=compiled, logits=lambda y: y)


def transformers(case: Case) -> Call:
    """Hugging Face's ViTForImageClassification with scaled_dot_product_attention."""
    from transformers import ViTConfig, ViTForImageClassification

    size = variants.parse(case.variant)
    config = ViTConfig(
        image_size=case.image_px,
        patch_size=size["patch_size"],
        hidden_size=size["width"],
        num_hidden_layers=case.depth or size["depth"],
        num_attention_heads=size["num_heads"],
        intermediate_size=size["mlp_dim"],
        num_labels=case.num_classes,
        attn_implementation="sdpa",
    )
    return _torch(case, ViTForImageClassification(config), compiled=False, logits=lambda y: y.logits)


def _torch(case: Case, model: Any, *, compiled: bool, logits: Callable[[Any], Any]) -> Call:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    model = model.to(device)
    x = torch.randn(case.batch, 3, case.image_px, case.image_px, device=device)
    y = torch.randint(case.num_classes, (case.batch,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    forward = torch.compile(model) if compiled else model
    low = case.dtype == "bfloat16"

    def precision() -> Any:
        return torch.autocast(device, dtype=torch.bfloat16) if low else contextlib.nullcontext()

    def infer() -> None:
        with torch.inference_mode(), precision():
            forward(x)

    def train() -> None:
        with precision():
            loss = torch.nn.functional.cross_entropy(logits(forward(x)).float(), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train(case.mode != "forward")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return (infer if case.mode == "forward" else train), wait


def flax(case: Case) -> Call:
    """A plain ViT of Flax's own layers under a scan, as other projects in JAX have it."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    size, dtype = variants.parse(case.variant), jnp.dtype(case.dtype)
    d, p, heads = size["width"], size["patch_size"], size["num_heads"]

    class Block(nn.Module):
        """Pre-norm, as in Dosovitskiy et al. 2021."""

        @nn.compact
        def __call__(self, x: Any, _: None) -> tuple[Any, None]:
            y = nn.LayerNorm(dtype=dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(heads, dtype=dtype, deterministic=True)(y, y)
            y = nn.Dense(size["mlp_dim"], dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
            return x + nn.Dense(d, dtype=dtype)(nn.gelu(y, approximate=False)), None

    class Plain(nn.Module):
        """Patches, class token, positions, blocks, classifier."""

        @nn.compact
        def __call__(self, image: Any) -> Any:
            x = nn.Conv(d, (p, p), (p, p), dtype=dtype)(image)
            x = x.reshape(x.shape[0], -1, d)
            token = self.param("token", nn.initializers.zeros, (1, 1, d))
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, d)).astype(dtype), x], axis=1)
            x = x + self.param("table", nn.initializers.normal(0.02), (1, x.shape[1], d)).astype(dtype)
            depth = case.depth or size["depth"]
            blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)
            x, _ = blocks()(x, None)
            return nn.Dense(case.num_classes)(nn.LayerNorm(dtype=dtype)(x)[:, 0].astype(jnp.float32))

    model, key = Plain(), jax.random.key(0)
    x = jax.random.normal(key, (case.batch, case.image_px, case.image_px, 3))
    labels = jax.random.randint(key, (case.batch,), 0, case.num_classes)
    params = jax.jit(model.init)(key, x[:1])
    if case.mode == "forward":
        infer, y = jax.jit(model.apply), x

        def classify() -> None:
            nonlocal y
            y = infer(params, x)

        return classify, lambda: y.block_until_ready()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.05))

    def loss(params: Any) -> Any:
        logits: Any = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    program, state = jax.jit(step, donate_argnums=(0, 1)), optimizer.init(params)

    def train() -> None:
        nonlocal params, state
        params, state = program(params, state)

    return train, lambda: jax.block_until_ready(params)


def keras(case: Case) -> Call:
    """A plain ViT of Keras layers on the JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as k

    if case.dtype == "bfloat16":
        k.mixed_precision.set_dtype_policy("mixed_bfloat16")
    size = variants.parse(case.variant)
    d, p, heads = size["width"], size["patch_size"], size["num_heads"]
    n = (case.image_px // p) ** 2 + 1

    class Tokens(k.layers.Layer):
        """Class token in front, positions added."""

        def build(self, shape: Any) -> None:
            self.token = self.add_weight(shape=(1, 1, d), initializer="zeros", name="token")
            self.table = self.add_weight(shape=(1, n, d), initializer="random_normal", name="table")

        def call(self, x: Any) -> Any:
            token = k.ops.broadcast_to(k.ops.cast(self.token, x.dtype), (k.ops.shape(x)[0], 1, d))
            return k.ops.concatenate([token, x], axis=1) + k.ops.cast(self.table, x.dtype)

    image = k.Input((case.image_px, case.image_px, 3), batch_size=case.batch)
    x = Tokens()(k.layers.Reshape((n - 1, d))(k.layers.Conv2D(d, p, p)(image)))
    for _ in range(case.depth or size["depth"]):
        y = k.layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + k.layers.MultiHeadAttention(heads, d // heads)(y, y)
        y = k.layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + k.layers.Dense(d)(k.layers.Dense(size["mlp_dim"], activation="gelu")(y))
    x = k.layers.LayerNormalization(epsilon=1e-6)(x)
    model = k.Model(image, k.layers.Dense(case.num_classes, dtype="float32")(x[:, 0]))
    model.compile(
        optimizer=k.optimizers.AdamW(1e-3, weight_decay=0.05, global_clipnorm=1.0),
        loss=k.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((case.batch, case.image_px, case.image_px, 3), np.float32)
    labels = rng.integers(0, case.num_classes, case.batch)
    if case.mode == "forward":
        return lambda: model.predict_on_batch(pixels), lambda: None
    return lambda: model.train_on_batch(pixels, labels), lambda: None


# Name -> (module that must be installed, what makes a call, its arguments).
PEERS: dict[str, tuple[str, Callable[..., Call], dict[str, Any]]] = {
    "flax": ("flax", flax, {}),
    "timm eager": ("timm", timm, {"compiled": False}),
    "timm compile": ("timm", timm, {"compiled": True}),
    "transformers": ("transformers", transformers, {}),
    "keras-jax": ("keras", keras, {}),
}


def installed() -> list[str]:
    """The peers whose library is here; says which are not."""
    found = [name for name, (module, *_) in PEERS.items() if importlib.util.find_spec(module)]
    for name in sorted(PEERS.keys() - found):
        print(f"left out, {PEERS[name][0]} is not installed: {name}", file=sys.stderr)
    return found


class Peer:
    """A peer in a child process; see `measure.Runner`."""

    def __init__(self, case: Case):
        command = [sys.executable, "-m", "vit_flax.benchmark.peers"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = case.name
        self.compile_seconds = self._ask(dataclasses.asdict(case))["seconds"]

    def run(self, steps: int) -> float:
        """See `measure.Runner`."""
        return self._ask({"steps": steps})["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise LeftOut(f"{self._name} ended with exit code {self._child.wait()}; its message is above")
        return json.loads(answer)


def serve() -> None:
    """The child's side: the first line of stdin is the case, every other one asks for so many steps."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    case = Case(**json.loads(sys.stdin.readline()))
    _, make, arguments = PEERS[case.library]
    since = time.perf_counter()
    call, wait = make(case, **arguments)
    call()
    wait()
    print(json.dumps({"seconds": time.perf_counter() - since}), file=answers, flush=True)
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        call()
        wait()
        since = time.perf_counter()
        for _ in range(steps):
            call()
        wait()
        secs = time.perf_counter() - since
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the others want the memory
        print(json.dumps({"seconds": secs}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
