"""Values of context variables for as long as a context lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


@contextlib.contextmanager
def within[T](variable: ContextVar[T], value: T) -> Iterator[None]:
    """Within, in this thread, the variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
