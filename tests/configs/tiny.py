"""The smallest job, for the tests of the command line."""

from tests.helpers import tiny_config as get_config

__all__ = ["get_config"]
