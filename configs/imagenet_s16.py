"""ViT-S/16 on ImageNet-1k from scratch, 90 epochs: the baseline of Beyer et al. 2022 (arXiv:2205.01580).

Argument   tfds: `imagenet2012` of TFDS, prepared as array_record; trained on train[:99%], as published.
           A folder with train/ and val/ (the archives of the authors, one folder a class); trained on all of train/.
           Without one, the digits, enlarged, in batches of 64, to see that everything runs (a CPU would take hours).
Result     published: 76.5 % top-1 on the validation set; 78.5 with 150 epochs and 80.0 with 300
           (--config.run.total_epochs=300). Not run here: no accelerator
Cost       9.1 GFLOP forward and 27 per training step and image; 111,477 steps. Published: 6 to 7 h on a TPU v3-8
Command    python -m vit_flax.main --config configs/imagenet_s16.py:tfds --workdir runs/imagenet_s16
           With tfds, choose numbers by the figures of `minival`: the validation set is what others test on.

Every number of the training is that of big_vision's `configs/vit_s16_i1k.py`, whose weight decay of 1e-4 is not
multiplied by the learning rate; a folder has 1 % more pictures, and so more steps. The crops and RandAugment are its
TensorFlow operations with their defects, as the published result has them (docs/data.md); `law="area"`,
`antialias=True` and no `variant` are the operations as meant. Its mixup draws once per device, this one once per batch.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vit_flax.picture_folders import class_folders, held_out_split

IMAGES = 1_268_355  # of train[:99%]


def get_config(data: str = "") -> ConfigDict:
    """The recipe on `data`: "tfds", a folder, or "" for the digits."""
    source, splits, num_classes = _data(data)
    config = ConfigDict()
    config.run = dict(seed=0, total_epochs=90.0, log_every_steps=50)
    config.data = dict(
        source=source,
        **splits,
        batch_size=1024 if data else 64,
        eval_batch_size=1024 if data else 64,
        train_transforms=[
            dict(
                op="inception_crop",
                size_px=224,
                area=(0.05, 1.0),
                aspect=(0.75, 1.33),
                law="tf_inception",
                filter="bilinear",
                antialias=False,
            ),
            dict(op="flip"),
            dict(op="randaugment", spec="randaug(2,10)", variant="published"),
        ],
        eval_transforms=[
            dict(op="resize_small", size_px=256, filter="area"),
            dict(op="central_crop", size_px=224),
        ],
    )
    config.model = dict(
        variant="S/16",
        num_classes=num_classes,
        posemb="sincos2d",
        pool="gap",
        representation_size=384,
        activation="gelu_tanh",
        dtype="bfloat16",  # what a TPU's products have in big_vision, too
    )
    config.augment = dict(mean=(0.5,), std=(0.5,), mixup_alpha=0.2, cutmix_alpha=0.0)
    config.loss = dict(name="softmax_xent", label_smoothing=0.0)
    config.optim = dict(
        name="adamw",
        lr=1e-3,
        weight_decay=1e-4 / 1e-3,  # here it is multiplied by the learning rate
        schedule="cosine",
        warmup_epochs=10_000 * 1024 / IMAGES,  # 10,000 steps
        clip_norm=1.0,
        mu_dtype="bfloat16",
    )
    config.checkpoint = dict(every_epochs=2.0, keep_last=2, best_metric="val/top1")
    config.evals = dict(val=dict(type="classification", every_epochs=2.0))
    if data == "tfds":
        config.evals["minival"] = dict(type="classification", every_epochs=2.0, split="train[99%:]")
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # data parallel on all devices; see docs/scaling.md
    return config


def _data(data: str) -> tuple[dict, dict, int]:
    """Source, splits, number of classes."""
    if not data:
        return dict(name="digits"), dict(train_split="train", eval_split="test"), 10
    if data == "tfds":
        splits = dict(train_split="train[:99%]", eval_split="validation")
        return dict(name="tfds", dataset="imagenet2012"), splits, 1000
    folder = Path(data).expanduser().absolute()
    splits = dict(train_split="train", eval_split=held_out_split(folder))
    return dict(name="folder", root=str(folder)), splits, len(class_folders(folder))
