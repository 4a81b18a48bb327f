"""Makes resample.npz: `python tests/golden/make_resample.py` where torch, scipy and timm are installed."""

from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from timm.models._manipulate import adapt_input_conv

rng = np.random.default_rng(0)
grid = rng.standard_normal((7, 5, 4))
kernel = rng.standard_normal((8, 8, 3, 6)).astype(np.float32)
out = {"grid": grid, "kernel": kernel}

image = torch.from_numpy(grid).permute(2, 0, 1)[None]
for rows, columns in [(7, 5), (12, 9), (3, 4), (10, 3), (1, 1)]:
    size = (rows, columns)
    scale = tuple((new + 0.1) / old for new, old in zip(size, grid.shape))
    results = {
        "bicubic": F.interpolate(image, size, mode="bicubic"),
        "bicubic_antialias": F.interpolate(image, size, mode="bicubic", antialias=True),
        "bicubic_offset": F.interpolate(image, scale_factor=scale, mode="bicubic"),
        "bilinear": F.interpolate(image, size, mode="bilinear"),
        "bilinear_antialias": F.interpolate(image, size, mode="bilinear", antialias=True),
    }
    for method, result in results.items():
        out[f"grid:{method}:{rows}x{columns}"] = result[0].permute(1, 2, 0).numpy()
    zoom = scipy.ndimage.zoom(grid, (rows / 7, columns / 5, 1), order=1)
    out[f"grid:bilinear_align_corners:{rows}x{columns}"] = zoom

weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
for size in [(4, 4), (12, 20)]:
    out[f"kernel:{size[0]}x{size[1]}"] = resample_patch_embed(weight, list(size)).permute(2, 3, 1, 0).numpy()
for channels in (1, 2, 5):
    out[f"channels:{channels}"] = adapt_input_conv(channels, weight).permute(2, 3, 1, 0).numpy()

np.savez_compressed(Path(__file__).parent / "resample.npz", **out)
