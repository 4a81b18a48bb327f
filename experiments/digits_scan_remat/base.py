"""The digits config with 12 blocks, and with the two knobs of the stack written out so that a sweep may change them."""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """Four epochs are enough to time a step."""
    config = digits.get_config()
    config.update(
        {
            "model": dict(depth=12, scan=True, remat="none"),
            "run": dict(total_epochs=4.0, log_every_steps=18),
            "optim": dict(warmup_epochs=1.0),
            "checkpoint": dict(every_epochs=None),
        }
    )
    return config
