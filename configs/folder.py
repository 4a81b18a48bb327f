"""A small ViT, trained from scratch on a folder of your own pictures.

Argument   the folder: FOLDER/<class>/*.jpg (a tenth is held out, by a hash of each path), or train/ and val/ above.
           Without one, the digits, to see that everything runs.
Result     depends on the pictures: with fewer than some thousands per class, configs/finetune.py does better
Cost       2.5 GFLOP forward and 7.5 per training step and image, at 224 px
Command    python -m vit_flax.main --config configs/folder.py:/path/to/pictures --workdir runs/pictures
           First: python -m vit_flax.data.check --source folder root=/path/to/pictures --splits train val
           Look:  python -m vit_flax.data.show --config configs/folder.py:/path/to/pictures --out batch.png
"""

from pathlib import Path

from ml_collections import ConfigDict

from vit_flax.picture_folders import class_folders, held_out_split


def get_config(root: str = "") -> ConfigDict:
    """Trains on the pictures below `root`, which comes after the colon of --config."""
    folder = Path(root).expanduser().absolute()
    config = ConfigDict()
    config.run = dict(seed=0, total_epochs=100.0, log_every_steps=20)
    config.data = dict(
        source=dict(name="folder", root=str(folder)) if root else dict(name="digits"),
        train_split="train",
        eval_split=held_out_split(folder) if root else "test",
        batch_size=64,
        eval_batch_size=64,
        train_transforms=[
            dict(op="inception_crop", size_px=224, filter="bicubic"),
            dict(op="flip"),
            dict(op="three_augment"),
        ],
        eval_transforms=[
            dict(op="resize_small", size_px=256, filter="bicubic"),
            dict(op="central_crop", size_px=224),
        ],
        on_error="raise",  # "skip" leaves bad pictures out, and counts them
    )
    config.model = dict(
        variant="Ti/16",
        num_classes=len(class_folders(folder)) if root else 10,
        posemb="sincos2d",
        pool="gap",
        drop_path=0.1,
    )
    config.augment = dict(
        mean=(0.485, 0.456, 0.406),  # of ImageNet
        std=(0.229, 0.224, 0.225),
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
    )
    config.loss = dict(name="softmax_xent", label_smoothing=0.1)
    config.optim = dict(
        name="adamw",
        lr=5e-4,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=5.0,
        clip_norm=1.0,
    )
    config.checkpoint = dict(every_epochs=5.0, keep_last=2, best_metric="val/top1")
    config.evals = dict(val=dict(type="classification", every_epochs=5.0))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # data parallel on all devices; see docs/scaling.md
    return config
