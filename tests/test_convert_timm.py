"""timm's checkpoints against the outputs of timm 1.0.31, and folders for timm against those that it has opened.

How the golden files were made: `golden/make_timm.py`.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden_cases import GOLDEN, TOLERANCE, assert_same_tensors, expected, folders, output, tensors
from vit_flax.convert import Preprocess, load_pretrained, save_pretrained
from vit_flax.convert.families.timm_architectures import facts_of
from vit_flax.models import ViT

NAMES = folders("timm_")
PLAIN = GOLDEN / "timm_vit_base_patch16_224"
REGISTERS_WITH_POSITIONS = "timm_vit_so150m_patch16_reg4_gap_256"  # these are folded into the registers


def test_golden_files_are_there():
    assert len(NAMES) == 31


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_timm_at_every_image_size(name):
    for i, (size, (image, theirs)) in enumerate(expected(name).items()):
        pretrained = load_pretrained(GOLDEN / name, image_size=size if i else None)
        assert pretrained.report.family == "timm"
        assert not pretrained.report.reinitialised
        assert not pretrained.report.unused
        np.testing.assert_allclose(output(pretrained, image), theirs, atol=TOLERANCE, rtol=0)
        has_table = "posemb" in pretrained.params
        assert list(pretrained.report.resampled) == (["posemb/table"] if i and has_table else [])


@pytest.mark.parametrize("name", NAMES)
def test_written_folder_is_the_one_that_timm_has_opened(name, tmp_path):
    loaded = load_pretrained(GOLDEN / name)
    written = save_pretrained(
        tmp_path / "out", loaded.model, loaded.params, family="timm", preprocess=loaded.preprocess
    )
    assert json.loads((written / "config.json").read_text()) == json.loads((GOLDEN / name / "written.json").read_text())
    if name == REGISTERS_WITH_POSITIONS:
        again = load_pretrained(written)
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, again.params))
    else:
        assert_same_tensors(tensors(written), tensors(GOLDEN / name))


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("channels:1", dict(channels=1)),
        ("channels:4", dict(channels=4)),
        ("patch:6", dict(patch_size=6, image_size=(24, 36))),
        ("patch:2", dict(patch_size=2, image_size=(12, 8))),
    ],
)
def test_other_channels_and_patches_are_those_of_timm(key, arguments):
    theirs = np.load(GOLDEN / "timm_adapted.npz")
    pretrained = load_pretrained(PLAIN, **arguments)
    ours = output(pretrained, theirs[f"image:{key}"])
    # timm inverts the resize of a patch in float32; on this kernel that is worth up to 1e-5 by itself.
    np.testing.assert_allclose(ours, theirs[f"output:{key}"], atol=2 * TOLERANCE if "patch" in key else TOLERANCE)
    assert "patch_embed/kernel" in pretrained.report.resampled


FACTS = json.loads((GOLDEN / "timm_architectures.json").read_text())


@pytest.mark.parametrize("architecture", FACTS)
def test_facts_of_an_architecture_are_those_of_the_built_model(architecture):
    if FACTS[architecture] is None:
        with pytest.raises(ValueError, match=f"timm's {architecture} is not"):
            facts_of(architecture)
    else:
        theirs = dict(FACTS[architecture])
        ours = {"activation": "silu" if theirs.pop("gated") else "gelu"} | facts_of(architecture)
        assert {name: ours[name] for name in theirs} == theirs


def test_most_architectures_are_read():
    assert sum(facts is not None for facts in FACTS.values()) == 176
    assert len(FACTS) == 244
