"""Cutting state and batch over eight virtual devices changes where a run computes, not what."""

import dataclasses
import functools
import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers import spread_config
from vit_flax import sharding
from vit_flax.checksums import checksums, differences
from vit_flax.collectives import collectives
from vit_flax.config import ConfigError
from vit_flax.job import build
from vit_flax.models.vit import ViT
from vit_flax.optim import make_optimizer
from vit_flax.step import init_state
from vit_flax.tree_paths import by_path

DEPTH, STEPS = 2, 5
ONE = dict(data=1, fsdp=1, tensor=1)
MESHES = {
    "dp8": dict(data=8, fsdp=1, tensor=1),
    "fsdp8": dict(data=1, fsdp=8, tensor=1),
    "tensor4": dict(data=2, fsdp=1, tensor=4),
    "all": dict(data=2, fsdp=2, tensor=2),
}


def config(scan=True, accumulate_steps=1):
    """Everything that could come out differently on several devices is on."""
    return spread_config(model__scan=scan, model__depth=DEPTH, run__accumulate_steps=accumulate_steps)


@dataclasses.dataclass
class Ran:
    job: object
    compiled: object
    losses: list
    state: object


@functools.cache
def ran(mesh="one", scan=True, accumulate_steps=1):
    """Five steps on a mesh."""
    devices = jax.devices()[:1] if mesh == "one" else None
    job = build(config(scan, accumulate_steps).to_dict() | dict(mesh=MESHES.get(mesh, ONE)), devices)
    state = jax.tree.map(put, first_state(scan), job.abstract_state())
    step = job.train_step().lower(state, next(job.train_batches(0))).compile()
    batches, losses = job.train_batches(0), []
    for _ in range(STEPS):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["loss"]))
    return Ran(job, step, losses, state)


@functools.cache
def first_state(scan):
    """Made on one device, and on the host since: steps donate theirs."""
    state = jax.jit(build(config(scan).to_dict() | dict(mesh=ONE), jax.devices()[:1]).init)()
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), state)


def put(x, like):
    return jax.random.wrap_key_data(x) if is_key(like) else jax.device_put(np.array(x), like.sharding)


def is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize(
    ("mesh", "scan", "accumulate_steps"),
    [*((mesh, True, 1) for mesh in MESHES), ("all", False, 1), ("all", True, 2)],
)
def test_training_on_eight_devices_equals_one(mesh, scan, accumulate_steps):
    one, eight = ran("one", scan, accumulate_steps), ran(mesh, scan, accumulate_steps)
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-5)
    assert "run.ema_decay" in one.state.hparams
    for name in ("params", "ema"):
        ours, theirs = (by_path(getattr(r.state, name)) for r in (eight, one))
        for path, value in theirs.items():
            largest = max(np.abs(value).max(), 1e-3)  # see `spread_config`
            np.testing.assert_allclose(ours[path], value, rtol=0, atol=1e-5 * largest, err_msg=f"{name}/{path}")
    moved = np.abs(one.state.params["patch_embed"]["kernel"] - first_state(scan).params["patch_embed"]["kernel"]).max()
    assert moved > 0.01  # much more than what is let pass


@pytest.mark.parametrize("mesh", MESHES)
def test_the_mesh_is_on(mesh):
    """Each device holds what the table says, before and after the steps."""
    job, state = ran(mesh).job, ran(mesh).state
    for path, leaf in by_path(state.params).items():
        cut = [axis for axis in sharding.spec_of(path, leaf.shape)[1] if axis is not None]
        parts = math.prod(job.mesh.shape[axis] for axis in cut)
        assert leaf.addressable_shards[0].data.size == leaf.size // parts, path
    assert dict(job.mesh.shape) == MESHES[mesh]
    kernel = state.params["blocks"]["mlp"]["fc1"]["kernel"]
    parts = MESHES[mesh]["fsdp"] * MESHES[mesh]["tensor"]
    assert [shard.data.size for shard in kernel.addressable_shards] == [kernel.size // parts] * 8


def in_loop(found, kind, axes):
    return [c for c in found if c.in_loop and c.kind == kind and c.axes == axes]


def of_layers(mesh):
    """The collectives of a step inside and outside the loop over the layers, without those of a few numbers."""
    found = [c for c in collectives(ran(mesh).compiled.as_text(), ran(mesh).job.mesh) if c.num_bytes > 256]
    assert all(c.times == (DEPTH if c.in_loop else 1) for c in found), found
    return found


def test_one_device_talks_to_nobody():
    assert collectives(ran("one").compiled.as_text(), ran("one").job.mesh) == []


def test_data_parallel_sums_gradients_only():
    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(ran("dp8").state.params))
    found = of_layers("dp8")
    assert {(c.kind, c.axes) for c in found} <= {("all-reduce", ("data",)), ("collective-permute", ())}
    summed = sum(c.num_bytes * c.times for c in found if c.kind == "all-reduce")
    assert summed == pytest.approx(params, rel=0.02)
    # What rolls the batch for mixup; a row goes to the neighbour.
    assert all(c.num_bytes <= 64 * 8 * 8 * 4 for c in found if c.kind != "all-reduce")


def test_fsdp_gathers_each_layer_when_it_needs_it_and_never_all_of_them():
    found = of_layers("fsdp8")
    blocks = ran("fsdp8").state.params["blocks"]
    kernels = [leaf for path, leaf in by_path(blocks).items() if path.endswith("kernel")]
    gathered = in_loop(found, "all-gather", ("fsdp",))
    # Forward and backward each gather the six kernels of a block once.
    one_layer = sum(kernel.size * 4 // DEPTH for kernel in kernels)
    assert len(kernels) == 6
    assert sum(c.num_bytes for c in gathered) == 2 * one_layer
    smallest_stack = min(kernel.size * 4 for kernel in kernels)
    outside = [c for c in found if not c.in_loop and c.kind == "all-gather"]
    assert max((c.num_bytes for c in outside), default=0) < smallest_stack
    # Gradients are summed over the devices: by a reduce-scatter where the backend has one, which the CPU's does not.
    summed = in_loop(found, "all-reduce", ("fsdp",)) + in_loop(found, "reduce-scatter", ("fsdp",))
    assert sum(c.num_bytes for c in summed) >= one_layer


def test_tensor_parallel_sums_activations_four_times_per_block_and_never_gathers_kernels():
    found = of_layers("tensor4")
    tokens = 64 // 2 * (16 + 2) * 32 * 4  # rows of one data replica, patches and prefix tokens, width, bytes
    summed = in_loop(found, "all-reduce", ("tensor",))
    forward = [c for c in summed if "transpose" not in c.op_name]
    backward = [c for c in summed if "transpose" in c.op_name]
    assert [c.num_bytes for c in forward] == [tokens] * 2  # after the attention and after the MLP
    assert sorted(c.num_bytes for c in backward) == [tokens, 3 * tokens]  # for the MLP; for queries, keys and values
    assert in_loop(found, "all-gather", ("tensor",)) == []


def test_product_does_each_of_them():
    found = of_layers("all")
    kinds = {(c.kind, c.axes) for c in found if c.in_loop}
    assert {("all-gather", ("fsdp",)), ("all-reduce", ("tensor",)), ("all-reduce", ("data",))} <= kinds
    assert ("all-gather", ("tensor",)) not in kinds
    assert ("all-gather", ("data",)) not in kinds


@pytest.mark.parametrize("mesh", MESHES)
def test_compiled_step_takes_what_the_table_says(mesh):
    job = ran(mesh).job
    abstract = job.abstract_state()
    state = sharding.bytes_per_device(abstract, jax.tree.map(lambda x: x.sharding, abstract))
    rows = job.data.batch_size // (MESHES[mesh]["data"] * MESHES[mesh]["fsdp"])
    batch = rows * (math.prod(job.data.image_shape) + 4 + 1)
    memory = ran(mesh).compiled.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(state + batch, abs=64)  # the key, and alignment


def abstract_state(mesh, **fields):
    """Of a model and its optimiser, without data."""
    model = ViT.from_variant("B/16", num_classes=1000, **fields)
    return jax.eval_shape(
        lambda: init_state(
            jax.random.key(0),
            init=lambda key: model.init(key, jax.numpy.zeros((1, 224, 224, 3)), train=False)["params"],
            optimizer=lambda _: make_optimizer(name="adamw", lr=1.0, weight_decay=0.1, total_steps=2),
            hparams={"run.ema_decay": jax.numpy.zeros(())},
        )
    )


def test_fsdp_divides_parameters_optimiser_and_average_by_eight():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    state = abstract_state(mesh)
    places = sharding.state_sharding(state, mesh)
    for name in ("params", "opt_state", "ema"):
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(getattr(state, name)))
        own = sharding.bytes_per_device(getattr(state, name), getattr(places, name))
        assert own == pytest.approx(whole / 8, rel=0.05), name


def test_optimiser_and_average_lie_like_their_parameter():
    mesh = sharding.make_mesh(**MESHES["all"])
    places = sharding.state_sharding(abstract_state(mesh), mesh)
    params = by_path(places.params)
    kept = by_path(places.opt_state)
    for path, place in params.items():
        mine = {where: p for where, p in kept.items() if where.endswith(f"/{path}")}
        assert len(mine) == 2, path  # both moments
        assert set(mine.values()) == {place} == {by_path(places.ema)[path]}
    assert {p.spec for where, p in kept.items() if "count" in where} == {P()}


EVERYTHING = [
    dict(pool="map", mlp="swiglu", mlp_norm=True, representation_size=1664, qk_norm=True, layer_scale=0.1, registers=4),
    dict(pool="tok_dist", dist_token=True, pre_norm=True),
]


def everything(**more):
    """Path -> shape of the parameters of large models in which every feature is on."""
    shapes = {}
    for fields in EVERYTHING:
        model = ViT.from_variant("G/14", num_classes=21_841, depth=2, **fields, **more)
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
        params = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)["params"]
        shapes |= by_path(params)
    return shapes


@pytest.mark.parametrize("scan", [True, False])
def test_every_large_parameter_has_a_rule_of_its_own(scan):
    for path, leaf in everything(scan=scan).items():
        pattern, spec = sharding.spec_of(path, leaf.shape)
        if leaf.size * 4 > 2**20 and path.endswith("kernel"):
            assert pattern, f"{path} {leaf.shape} has no rule of its own"
            assert "fsdp" in spec, f"{path} {leaf.shape} is whole on every device"


@pytest.mark.parametrize("scan", [True, False])
def test_every_rule_matches_something(scan):
    used = {sharding.spec_of(path, leaf.shape)[0] for path, leaf in everything(scan=scan).items()}
    assert used == {pattern for pattern, _ in sharding.RULES}


def test_table_of_a_model():
    """The golden table of S/16: a rule that changes changes where checkpoints' arrays lie, on purpose or not."""
    model = ViT.from_variant("S/16", num_classes=1000, pool="map")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    params = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)["params"]
    table = {path: tuple(sharding.spec_of(path, leaf.shape)[1]) for path, leaf in by_path(params).items()}
    projection, its_bias = ("fsdp", "tensor", None), ("tensor", None)
    block = {
        "attention/key/bias": its_bias,
        "attention/key/kernel": projection,
        "attention/out/bias": (None,),
        "attention/out/kernel": ("tensor", None, "fsdp"),
        "attention/query/bias": its_bias,
        "attention/query/kernel": projection,
        "attention/value/bias": its_bias,
        "attention/value/kernel": projection,
        "mlp/fc1/bias": ("tensor",),
        "mlp/fc1/kernel": ("fsdp", "tensor"),
        "mlp/fc2/bias": (None,),
        "mlp/fc2/kernel": ("tensor", "fsdp"),
    }
    norms = {f"{name}/{leaf}": (None,) for name in ("norm1", "norm2") for leaf in ("bias", "scale")}
    assert table == {
        **{f"blocks/{path}": (None, *spec) for path, spec in (block | norms).items()},
        **{f"pool/{path}": spec for path, spec in block.items()},
        "head/bias": (None,),
        "head/kernel": ("fsdp", None),
        "norm/bias": (None,),
        "norm/scale": (None,),
        "patch_embed/bias": (None,),
        "patch_embed/kernel": (None, "fsdp"),
        "pool/norm/bias": (None,),
        "pool/norm/scale": (None,),
        "pool/probe": (None, None, None),
        "posemb/table": (None, None, "fsdp"),
    }


def test_state_is_made_with_the_same_bits_on_every_mesh():
    job = ran("all").job
    state = jax.jit(job.init, out_shardings=jax.tree.map(lambda x: x.sharding, job.abstract_state()))()
    assert differences(checksums(state.params), checksums(first_state(True).params)) == {}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=3), "data=3, fsdp=1, tensor=1 do not fit 8 devices"),
        (dict(data=-1, fsdp=3), "data=-1, fsdp=3, tensor=1 do not fit 8 devices"),
        (dict(data=-1, fsdp=-1), "data=-1, fsdp=-1, tensor=1 do not fit"),
        (dict(data=8, fsdp=0), "data=8, fsdp=0, tensor=1 do not fit"),
        (dict(data=-1, fsdp=16), "fsdp=16"),
    ],
)
def test_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_what_is_left_goes_to_the_free_axis():
    assert dict(sharding.make_mesh().shape) == dict(data=8, fsdp=1, tensor=1)
    assert dict(sharding.make_mesh(data=2, fsdp=-1, tensor=2).shape) == dict(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("mesh", "change", "message"),
    [
        (dict(tensor=8), {}, r"mesh\.tensor=8 does not divide dimension 2 of blocks/attention/.*\[2, 32, 4, 8\]"),
        (dict(fsdp=8), dict(model__width=36), r"mesh\.fsdp=8 does not divide dimension 1 of .*\[36, 10\]|\[2, 36"),
        (dict(), dict(data__batch_size=60), "data: data.batch_size=60 cannot be cut into 8 equal parts"),
        (dict(), dict(data__eval_batch_size=359), "data.eval_batch_size=359 cannot be cut into 8"),
        (dict(), dict(run__accumulate_steps=16), r"64 cannot be cut into 128 .*data 8 x fsdp 1 x accumulate_steps 16"),
        (dict(data=5), {}, "mesh: data=5, fsdp=1, tensor=1 do not fit 8 devices"),
        (dict(dat=5), {}, r"unknown key mesh\.dat: did you mean mesh\.data\?"),
    ],
)
def test_config_that_cannot_be_cut_names_what_and_how_far(mesh, change, message):
    ours = config()
    for key, value in change.items():
        section, name = key.split("__")
        ours[section][name] = value
    with pytest.raises(ConfigError, match=message):
        build(ours.to_dict() | dict(mesh=mesh))


def chip(number, slice_index):
    """What the layout of a mesh asks of a TPU chip, in a slice of 2 x 4."""
    return types.SimpleNamespace(
        id=8 * slice_index + number,
        platform="tpu",
        device_kind="TPU v5 lite",
        coords=(number % 2, number // 2, 0),
        core_on_chip=0,
        process_index=2 * slice_index + number // 4,
        slice_index=slice_index,
    )


def test_slices_of_a_tpu_job_are_data_replicas():
    """Only the gradients' sum crosses the slow network between slices."""
    devices = [chip(number, slice_index) for slice_index in (0, 1) for number in range(8)]
    grid = sharding._grid(devices, (4, 2, 2))
    assert grid.shape == (4, 2, 2)
    assert [{d.slice_index for d in half.flat} for half in (grid[:2], grid[2:])] == [{0}, {1}]
    with pytest.raises(ValueError, match="data=1 must be a multiple of the 2 slices"):
        sharding._grid(devices, (1, 8, 2))


def test_processes_may_hold_scattered_parts_of_a_batch():
    """As on a TPU slice whose hosts are squares."""
    scattered = {0: {0, 1, 4, 5}, 1: {2, 3, 6, 7}}
    assert [sharding._shard_among(scattered, 8, process) for process in (0, 1)] == [(0, 2), (1, 2)]
    tensor_over_two_processes = {0: {0}, 1: {0}, 2: {1}, 3: {1}}
    assert [sharding._shard_among(tensor_over_two_processes, 2, i) for i in range(4)] == [
        (0, 2),
        (0, 2),
        (1, 2),
        (1, 2),
    ]
    with pytest.raises(ValueError, match="have to be equal or have none in common"):
        sharding._shard_among({0: {0, 1}, 1: {1, 2}}, 3, 0)
