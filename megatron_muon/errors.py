"""The error that a user's mistake raises."""

from __future__ import annotations

__all__ = ["ConfigError"]


class ConfigError(ValueError):
    """A flag, a parameter or a combination that cannot be honoured.

    The message names the flag or parameter, its value, and the way out. The launcher prints it as one line; elsewhere
    it is an ordinary exception that is raised before the first training step.
    """
