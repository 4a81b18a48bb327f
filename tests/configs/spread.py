"""The smallest config, with everything that could come out differently on several devices or processes."""

from tests.helpers import spread_config


def get_config():
    return spread_config()
