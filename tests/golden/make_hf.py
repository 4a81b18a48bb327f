"""Makes the hf_* files: `PYTHONPATH=. python tests/golden/make_hf.py` where torch and transformers are installed.

Each tiny case of the parity table (`vit_flax/convert/parity/huggingface.py`) becomes
  hf_NAME/         the checkpoint, as the library saves it
  hf_NAME.io.npz   images of three sizes, the library's output, and `exported`: names and shapes of the tensors and the
                   config.json that `save_pretrained` writes for it, after the library has opened that without a
                   complaint and computed the same from it
hf_preprocess.npz  a picture and what the library's image processors (on Pillow) make of it
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from vit_flax.convert import load_pretrained, save_pretrained
from vit_flax.convert.parity.huggingface import CASES
from vit_flax.convert.source import CONFIG, PREPROCESSOR, open_source

HERE = Path(__file__).parent
rng = np.random.default_rng(0)


def exported(case, checkpoint, image):
    """What we write for a checkpoint, verified with the library."""
    pretrained = load_pretrained(checkpoint)
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
        path = save_pretrained(
            Path(folder) / "out",
            pretrained.model,
            pretrained.params,
            family=case.family,
            class_names=pretrained.class_names,
            preprocess=pretrained.preprocess,
        )
        ours, _ = pretrained.model.apply({"params": pretrained.params}, image, train=False)
        np.testing.assert_allclose(open_exported(path)(image), ours, atol=1e-5, rtol=0)
        shapes = {name: tensor.shape for name, tensor in open_source(path).tensors.items()}
        return {"shapes": shapes, "config": json.loads((path / CONFIG).read_text())}


def open_exported(folder):
    """What transformers computes from a folder that `save_pretrained` wrote.

    Returns: images [b, h, w, c] -> logits, or features where there is no head.

    Raises: ValueError: the class finds keys missing, unexpected or of another shape.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = json.loads((folder / CONFIG).read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    if problems := {what: keys for what, keys in info.items() if keys}:
        raise ValueError(f"{name}.from_pretrained({folder}) is not content: {problems}")

    def apply(images):
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        with torch.no_grad():
            out = model.eval()(pixels)
        for key in ("logits", "image_embeds", "pooler_output"):
            if key in out:
                return out[key].numpy()
        return out["last_hidden_state"][:, 0].numpy()

    return apply


for case in CASES:
    if case.full_size or "gradients" in case.name:
        continue
    name = "hf_" + re.sub(r"\W+", "_", case.name).strip("_")
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    reference = case.build(0)
    path = reference.write(HERE / name)
    io = {"family": case.family, "output": case.output}
    for rows, columns in case.image_sizes:
        image = rng.standard_normal((1, rows, columns, 3)).astype(np.float32)
        io[f"image:{rows}x{columns}"] = image
        io[f"expected:{rows}x{columns}"] = reference.apply(image)
    first = "{}x{}".format(*case.image_sizes[0])
    io["exported"] = json.dumps(exported(case, path, io[f"image:{first}"]))
    np.savez_compressed(HERE / f"{name}.io.npz", **io)
    print(name, f"{sum(f.stat().st_size for f in (HERE / name).iterdir()) / 1e3:.0f} kB")

import transformers  # noqa: E402

y, x = np.mgrid[:60, :98]
waves = [128 + 100 * np.sin(x / a) * np.cos(y / b) for a, b in ((5, 7), (9, 4), (3, 11))]
picture = (np.stack(waves, axis=-1) + 27 * rng.random((60, 98, 3))).astype(np.uint8)
io = {"picture": picture}
for kind, sizes in {
    "ViT": dict(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "DeiT": dict(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
    "Bit": dict(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]),
    "CLIP": dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "Siglip": dict(size={"height": 32, "width": 32}),
}.items():
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**sizes)
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        io[f"config:{kind}"] = (Path(folder) / PREPROCESSOR).read_text()
    io[f"pixels:{kind}"] = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
np.savez_compressed(HERE / "hf_preprocess.npz", **io)
