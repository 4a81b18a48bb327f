"""A small ViT on scikit-learn's handwritten digits: real scans that travel with the package, no download.

Task       1,797 grey images of 8x8 pixels, 10 classes; a fixed random 20 % (359) is held out.
Result     98.3 % top-1, mean of seeds 0, 1, 2 on an Intel Xeon: 98.9, 98.1, 98.1 (one image is 0.28 points). CPUs round
           differently: with the model's earlier arithmetic it was 97.7 there and 98.1 on an AMD EPYC
Cost       62 to 112 s on two CPU cores, compilation included; 120 to 145 s where they are shared with a test run
Command    python -m vit_flax.main --config configs/digits.py --workdir runs/digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The main job."""
    config = ConfigDict()
    config.run = dict(
        seed=0,
        data_seed=None,  # for sweeps over seeds
        total_epochs=110.0,
        log_every_steps=100,
    )
    config.data = dict(
        source=dict(name="digits"),
        train_split="train",
        eval_split="test",
        batch_size=64,
        eval_batch_size=360,  # 359 and one of padding: a multiple of the usual numbers of devices
        train_transforms=[dict(op="decode", channels=1)],
        eval_transforms=[dict(op="decode", channels=1)],
    )
    config.model = dict(
        num_classes=10,
        patch_size=2,
        width=96,
        depth=4,
        mlp_dim=192,
        num_heads=4,
        posemb="sincos2d",  # learned positions reach 96.5 % in the same time
        pool="gap",
        drop_path=0.1,
    )
    # The images are so small that all augmentation is arithmetic on the device.
    config.augment = dict(
        mean=(0.5,),
        std=(0.5,),
        affine=dict(rotate_degrees=15.0, scale_percent=15.0, translate_px=1.0, shear_degrees=10.0),
        mixup_alpha=0.0,
        cutmix_alpha=0.0,
    )
    config.loss = dict(name="softmax_xent", label_smoothing=0.1)
    config.optim = dict(
        name="adamw",
        lr=2e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=8.0,
        clip_norm=1.0,
    )
    config.checkpoint = dict(every_epochs=22.0, keep_last=2, best_metric="test/top1")
    config.evals = dict(test=dict(type="classification", every_epochs=22.0))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # data parallel on all devices; see docs/scaling.md
    return config
