"""The digits config with 12 blocks, and with the two knobs of the stack written out so that a sweep may change them."""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """Four epochs are enough to time a step."""
    config = digits.get_config()
    config.model.update(dict(depth=12, scan=True, remat="none"))
    config.run.total_epochs = 4.0
    config.run.log_every_steps = 22
    config.optim.warmup_epochs = 1.0
    config.checkpoint.every_epochs = None
    return config
