"""What checks the annotations of the package while its tests run; see conftest.py."""

from typing import Any

from beartype import beartype


def check(function: Any) -> Any:
    """Beartype, but for functions inside functions: made anew in every call, they would be decorated in every call."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
