"""Foreign checkpoints against the outputs of the code that they come from, and back.

`golden/NAME.ckpt.npz` (or a folder NAME) is a tiny checkpoint with random weights, `golden/NAME.io.npz` an input and
what the reference implementation made of it; `golden/README.md` says how they were made.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_flax.convert import load_pretrained, save_pretrained

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of float32 logits of size 1

NPZ = {  # name: the family that it has to be recognised as
    "big_vision_gap_prelogits": "big_vision",
    "big_vision_gap_sincos2d_rect": "big_vision",
    "big_vision_map_scan": "big_vision",
    "big_vision_map_siglip": "big_vision",
    "big_vision_tok": "big_vision",
    "vit_jax_linen_prelogits": "google",
    "vit_jax_prelinen": "google",
}


def checkpoint(name):
    npz = GOLDEN / f"{name}.ckpt.npz"
    return npz if npz.exists() else GOLDEN / name


def apply(pretrained, image):
    run = jax.jit(lambda params, image: pretrained.model.apply({"params": params}, image, train=False))
    with jax.default_matmul_precision("highest"):
        return run(pretrained.params, jnp.asarray(image))


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


@pytest.mark.parametrize("name", NPZ)
def test_logits_are_those_of_the_reference(name):
    pretrained = load_pretrained(checkpoint(name))
    assert pretrained.report.family == NPZ[name]
    assert not pretrained.report.reinitialised
    expected = np.load(GOLDEN / f"{name}.io.npz")
    output, out = apply(pretrained, expected["image"])
    np.testing.assert_allclose(output, expected["logits" if "logits" in expected else "output"], atol=TOLERANCE, rtol=0)
    if "encoded" in expected:
        np.testing.assert_allclose(out["encoded"], expected["encoded"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["npz", "vit_flax"])
@pytest.mark.parametrize("name", NPZ)
def test_round_trip_is_bitwise(name, family, tmp_path):
    first = load_pretrained(checkpoint(name))
    path = save_pretrained(tmp_path / "out", first.model, first.params, family=family, preprocess=first.preprocess)
    second = load_pretrained(path)
    assert_same(first.params, second.params)
    assert second.model == first.model
