"""The design that this project was asked for, step by step: 512x512 images, 32x32 patches, class token, 12 layers.

Input      512x512x3, cut into N = 512*512 / (32*32) = 256 patches of 32*32*3 = 3072 numbers
Embedding  3072 -> 768, plus a learned embedding of the positions 0..255, then the class token in front
Encoder    12 pre-norm blocks: attention of 12 heads, MLP of 3072 exact-GELU units, skip connections; dropout 0.1
Classifier LayerNorm -> class token -> dropout -> 10 classes
Argument   none: each head's queries, keys and values are as wide as the model (768), as in that design;
           "standard": 768 / 12 = 64 wide, as in the paper (arXiv:2010.11929)
Size       399,352,330 parameters; Keras counts 399,155,722 for the same design, because a functional Keras model does
           not track the 256*768 position table. "standard": 87,621,130
Result     none: not trained here. The pictures are the embedded digits, enlarged, so that the file runs everywhere;
           put your own ten classes in with data.source=dict(name="folder", root=...)
Cost       222 GFLOP per image forward ("standard": 44); 18 GB (4 GB) of activations a step: for an accelerator
Command    python -m vit_flax.main --config configs/vit_from_scratch_512.py --mode dry_run
           python -m vit_flax.main --config configs/vit_from_scratch_512.py:standard --workdir runs/scratch
"""

from ml_collections import ConfigDict

HEAD_DIMS = {"": 768, "standard": 64}


def get_config(head: str = "") -> ConfigDict:
    """The design, with wide heads ("") or the paper's ("standard")."""
    if head not in HEAD_DIMS:
        raise ValueError(f"unknown argument {head!r}: write nothing for heads of 768, or 'standard' for heads of 64.")
    config = ConfigDict()
    config.run = dict(seed=0, total_epochs=30.0, log_every_steps=10)
    to_512 = [dict(op="resize", size_px=512, filter="bilinear")]
    config.data = dict(
        source=dict(name="digits"),
        train_split="train",
        eval_split="test",
        batch_size=32,
        eval_batch_size=32,
        train_transforms=to_512,
        eval_transforms=to_512,
        decode_once=False,  # 1,438 images of 786 kB
    )
    config.model = dict(
        variant="B/32",
        num_classes=10,
        head_dim=HEAD_DIMS[head],
        class_token_position=False,  # the class token joins after the positions were added
        norm_eps=1e-3,
        dropout=0.1,
        head_dropout=0.1,
    )
    config.augment = dict(mean=(0.5,), std=(0.5,), mixup_alpha=0.0, cutmix_alpha=0.0)
    config.loss = dict(name="softmax_xent", label_smoothing=0.0)
    config.optim = dict(name="adamw", lr=1e-4, weight_decay=0.05, schedule="cosine", warmup_epochs=3.0, clip_norm=1.0)
    config.checkpoint = dict(every_epochs=5.0, keep_last=2, best_metric="test/top1")
    config.evals = dict(test=dict(type="classification", every_epochs=5.0))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # data parallel on all devices; see docs/scaling.md
    return config
