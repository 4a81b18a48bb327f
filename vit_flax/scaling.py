"""How large models would train on many chips, on paper: `python -m vit_flax.scaling` prints docs/scaling.md's tables.

Nothing is run and nothing is measured here. Sizes of the state come from the model and from the sharding rules; rates
of the chips from their vendors (`chips.py`); the rest is in `Assumptions`, to be argued with: every field is an option
of the command.
"""

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from vit_flax import sharding
from vit_flax.chips import CHIPS, GIB, Chip
from vit_flax.models.flops import forward_flops
from vit_flax.models.vit import ViT
from vit_flax.optim import make_optimizer
from vit_flax.step import TrainState, init_state

MODELS = ("B/16", "L/16", "H/14", "G/14")
NUM_CHIPS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Assumptions:
    """What the tables rest on.

    Attributes:
      batch_size: images per step over all chips, the same for any number of them (strong scaling).
      image_px: side of an image.
      compute_efficiency: part of a chip's peak that the matrix products reach on one chip, without communication.
      link_efficiency: part of a link's rate that a large collective reaches.
      memory_part: of a chip's memory that the program may fill.
      activation_bytes: kept for the backward pass, per token, unit of width and block, with bfloat16 activations.
      attention_bytes: kept per pair of tokens, head and block, where the attention is not fused.
    """

    batch_size: int = 4096
    image_px: int = 224
    compute_efficiency: float = 0.5
    link_efficiency: float = 0.8
    memory_part: float = 0.9
    activation_bytes: float = 34.0
    attention_bytes: float = 2.0


@dataclass(frozen=True)
class Plan:
    """One way to train a model on a number of chips, and what it costs.

    Attributes:
      data, fsdp: sizes of the mesh.
      remat: of the model.
      accumulate_steps: parts of a batch, one after the other.
      state_bytes, gradient_bytes, activation_bytes: in the memory of one chip.
      near_bytes, far_bytes: that one chip sends per step over its fast links and over the network.
      compute_secs, near_secs, far_secs: per step.
    """

    data: int
    fsdp: int
    remat: str
    accumulate_steps: int
    state_bytes: float
    gradient_bytes: float
    activation_bytes: float
    near_bytes: float
    far_bytes: float
    compute_secs: float
    near_secs: float
    far_secs: float

    @property
    def memory_bytes(self) -> float:
        """Of one chip."""
        return self.state_bytes + self.gradient_bytes + self.activation_bytes

    @property
    def overlapped(self) -> float:
        """Part of the time spent computing if all communication that can hide behind it does."""
        return self.compute_secs / max(self.compute_secs, self.near_secs, self.far_secs)

    @property
    def exposed(self) -> float:
        """The same if nothing hides."""
        return self.compute_secs / (self.compute_secs + self.near_secs + self.far_secs)


def plan(variant: str, chip: Chip, num_chips: int, assumed: Assumptions) -> Plan | None:
    """The plan that costs least among those that fit: no recomputation, then the fewest parts of the batch and the
    smallest `fsdp`; None where none fits.
    """
    sizes = [2**i for i in range(int(math.log2(min(num_chips, chip.near_devices))) + 1)]
    rows = assumed.batch_size // num_chips
    parts = [2**i for i in range(int(math.log2(max(rows, 1))) + 1)]
    for remat, accumulate, fsdp in itertools.product(("none", "full"), parts, sizes):
        found = cost(variant, chip, num_chips // fsdp, fsdp, remat, accumulate, assumed)
        if found.memory_bytes <= assumed.memory_part * chip.memory_bytes:
            return found
    return None


def cost(
    variant: str, chip: Chip, data: int, fsdp: int, remat: str, accumulate_steps: int, assumed: Assumptions
) -> Plan:
    """What a mesh of `data` x `fsdp` chips costs; see `Plan`."""
    model, num_chips = _model(variant), data * fsdp
    state, params = _state_bytes(variant, fsdp, assumed.image_px), _num_params(variant, assumed.image_px)
    images = assumed.batch_size / num_chips
    side = assumed.image_px // model.patch_shape[0]
    flops = forward_flops(model, (side, side)) * (4 if remat == "full" else 3) * images
    # FSDP gathers bfloat16 weights in the forward and in the backward pass, and scatters the sum of float32 gradients.
    of_others = (fsdp - 1) / fsdp
    near = accumulate_steps * params * of_others * (2 * 2 + 4)
    # The replicas then sum what is left: first among near neighbours, then each its part over the network.
    near_replicas = max(1, min(data, chip.near_devices // fsdp))
    gradients = 4 * params / fsdp
    near += accumulate_steps * 2 * gradients * (near_replicas - 1) / near_replicas
    groups = data // near_replicas
    far = accumulate_steps * 2 * gradients / near_replicas * (groups - 1) / groups
    return Plan(
        data=data,
        fsdp=fsdp,
        remat=remat,
        accumulate_steps=accumulate_steps,
        state_bytes=state,
        gradient_bytes=gradients + (2 * 2 * params / model.depth if fsdp > 1 else 0),
        activation_bytes=_activation_bytes(model, chip, images / accumulate_steps, remat, assumed),
        near_bytes=near,
        far_bytes=far,
        compute_secs=flops / (chip.flops_per_sec * assumed.compute_efficiency),
        near_secs=near / (chip.near_bytes_per_sec * assumed.link_efficiency),
        far_secs=far / (chip.far_bytes_per_sec * assumed.link_efficiency),
    )


def _activation_bytes(model: ViT, chip: Chip, images: float, remat: str, assumed: Assumptions) -> float:
    """What the backward pass needs of the forward pass: of all blocks, or their inputs and one block."""
    n = (assumed.image_px // model.patch_shape[0]) ** 2 + model.num_prefix_tokens
    block = n * model.width * assumed.activation_bytes
    if not chip.has_fused_attention:
        block += n * n * model.num_heads * assumed.attention_bytes
    return images * (block * model.depth if remat == "none" else n * model.width * 2 * model.depth + block)


@functools.cache
def _model(variant: str) -> ViT:
    return ViT.from_variant(variant, num_classes=1000, dtype="bfloat16")


@functools.cache
def _abstract_state(variant: str, image_px: int) -> TrainState:
    """Parameters, AdamW's two moments and a moving average, all float32."""
    return jax.eval_shape(
        lambda: init_state(
            jax.random.key(0),
            init=lambda key: _model(variant).init(key, jnp.zeros((1, image_px, image_px, 3)), train=False)["params"],
            optimizer=lambda _: make_optimizer(name="adamw", lr=1e-3, weight_decay=0.1, total_steps=1),
            hparams={"run.ema_decay": jnp.zeros(())},
        )
    )


def _num_params(variant: str, image_px: int) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(_abstract_state(variant, image_px).params))


@functools.cache
def _state_bytes(variant: str, fsdp: int, image_px: int) -> int:
    state = _abstract_state(variant, image_px)
    mesh = AbstractMesh((1, fsdp, 1), ("data", "fsdp", "tensor"))
    return sharding.bytes_per_device(state, sharding.state_sharding(state, mesh))


def table(variant: str, chip: Chip, counts: Iterable[int], assumed: Assumptions) -> str:
    """A table in Markdown, one row per number of chips."""
    params = _num_params(variant, assumed.image_px) / 1e6
    head = (
        "chips | data x fsdp | images per chip | remat | parts | state | gradients | activations | "
        "GB sent, near | GB sent, far | compute s | near s | far s | overlapped | exposed"
    )
    lines = [f"**{variant}** ({params:,.0f} M parameters) on {chip.name}", "", f"| {head} |", "|---" * 15 + "|"]
    for count in counts:
        found = plan(variant, chip, count, assumed)
        lines.append(f"| {count} | " + (_row(found, count, assumed) if found else "does not fit" + " |" * 13) + " |")
    return "\n".join(lines)


def _row(p: Plan, count: int, assumed: Assumptions) -> str:
    memory = (f"{b / GIB:.1f} GiB" for b in (p.state_bytes, p.gradient_bytes, p.activation_bytes))
    sent = (f"{b / 1e9:.2f}" for b in (p.near_bytes, p.far_bytes))
    secs = (f"{s:.3f}" for s in (p.compute_secs, p.near_secs, p.far_secs))
    cells = [f"{p.data} x {p.fsdp}", f"{assumed.batch_size // count}", p.remat, f"{p.accumulate_steps}"]
    return " | ".join([*cells, *memory, *sent, *secs, f"{p.overlapped:.0%}", f"{p.exposed:.0%}"])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and what they rest on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Assumptions):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    assumed = Assumptions(**vars(parser.parse_args(argv)))
    print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(assumed).items()))
    for chip in CHIPS.values():
        print(f"\n### {chip.name}\n\nSource: {chip.source}.")
        for variant in MODELS:
            print(f"\n{table(variant, chip, NUM_CHIPS, assumed)}")


if __name__ == "__main__":
    main()
