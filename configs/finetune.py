"""Fine-tuning from any checkpoint, on pictures in folders or on a small data set.

Argument   CHECKPOINT,DATA[,SIZE]. CHECKPOINT is whatever `load_pretrained` opens (file, folder, workdir, address). DATA
           is a folder (see `vit_flax.data.folder`: FOLDER/<class>/*.jpg, or train/ and val/ or test/ above) or one of
           digits, mnist, fashion_mnist, cifar10, cifar100. SIZE is the side of the square pictures in pixels (224); the
           position table is resampled for it.
Recipe     SGD with momentum 0.9, no weight decay, clipping at 1, a cosine, and a head of zeros: the transfer recipe of
           Steiner et al. 2022 (arXiv:2106.10270), whose largest lr of 0.03 for 512 pictures is 0.00375 for 64. They go
           down to 0.003 for small data sets: it is the number to tune.
Result     none for published weights: none were at hand where this was written. The default is a checkpoint of the
           tests with 40,000 random weights, so that everything can be seen to run: 35 % top-1 on the digits.
Cost       45 s on two CPU cores, for the default.
Command    python -m vit_flax.main --config configs/finetune.py:vit_small.safetensors,~/pictures --workdir runs/mine
"""

from pathlib import Path

from ml_collections import ConfigDict

from vit_flax.picture_folders import held_out_split

SMALL = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")


def get_config(arg: str = "tests/golden/vit_jax_prelinen.ckpt.npz,digits,32") -> ConfigDict:
    """The job; `arg` as above."""
    checkpoint, data, size_px = _parse(arg)
    config = ConfigDict()
    config.run = dict(seed=0, total_epochs=10.0, log_every_steps=20)
    config.init = dict(path=checkpoint, preprocess="checkpoint")
    # The filter of every resize comes from the checkpoint.
    whole = [dict(op="decode", channels=3), dict(op="resize", size_px=size_px)]
    crop = [dict(op="inception_crop", size_px=size_px, area=(0.08, 1.0)), dict(op="flip")]
    middle = [dict(op="resize_small", size_px=round(size_px / 0.875)), dict(op="central_crop", size_px=size_px)]
    config.data = dict(
        source=dict(name=data) if data in SMALL else dict(name="folder", root=data),
        train_split="train",
        eval_split="test" if data in SMALL else held_out_split(Path(data).expanduser()),
        batch_size=64,
        eval_batch_size=64,
        train_transforms=whole if data in SMALL else crop,
        eval_transforms=whole if data in SMALL else middle,
    )
    config.model = dict(drop_path=0.0)  # everything else is the checkpoint's; the number of classes is the data's
    config.augment = dict(mixup_alpha=0.0, cutmix_alpha=0.0)  # mean and std are the checkpoint's
    config.loss = dict(name="softmax_xent", label_smoothing=0.0)
    config.optim = dict(
        name="sgd",
        momentum=0.9,
        lr=0.00375,
        weight_decay=0.0,
        schedule="cosine",
        warmup_epochs=1.0,
        clip_norm=1.0,
    )
    config.checkpoint = dict(every_epochs=2.0, keep_last=2, best_metric="test/top1")
    config.evals = dict(test=dict(type="classification", every_epochs=2.0))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # data parallel on all devices; see docs/scaling.md
    return config


def _parse(arg: str) -> tuple[str, str, int]:
    """Checkpoint, data and size in pixels."""
    parts = [part.strip() for part in arg.split(",")]
    size = parts[2] if len(parts) == 3 else "224"
    if len(parts) not in (2, 3) or not all(parts) or not size.isdecimal() or int(size) == 0:
        raise ValueError(f"expected CHECKPOINT,DATA[,SIZE] after configs/finetune.py:, SIZE in pixels; found {arg!r}")
    return parts[0], parts[1], int(size)
