"""Foreign weights in and out: one engine, one table per family.

>>> from vit_flax.convert import load_pretrained
>>> pretrained = load_pretrained("deit_small/", num_classes=10, image_size=384)  # doctest: +SKIP
>>> print(pretrained.report)  # doctest: +SKIP
"""

from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.pretrained import Pretrained, load_pretrained
from vit_flax.convert.report import Report
from vit_flax.convert.save import save_pretrained

__all__ = ["Preprocess", "Pretrained", "Report", "load_pretrained", "save_pretrained"]
