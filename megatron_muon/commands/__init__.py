"""Commands of ``python -m megatron_muon``, one file each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_muon.errors import ConfigError

__all__ = ["refusing", "write_json"]


@contextlib.contextmanager
def refusing(command: str, errors: tuple[type[Exception], ...] = (ConfigError,)) -> Iterator[None]:
    """Within, these errors end the command with their message and code 2.

    Imports of Megatron-Core warn of every optional package that is missing: nothing is said of that.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        yield
    except BrokenPipeError:  # whoever reads has read enough, as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        raise SystemExit(0) from None
    except errors as error:
        print(f"megatron_muon {command}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def write_json(path: str, content: object) -> None:
    """Write what ``--json`` asks for.

    Raises:
        ConfigError: if it cannot be written there.
    """
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}. Give a file in a folder that exists.") from None
