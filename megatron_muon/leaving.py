"""How a process that trained on the CPU ends."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys


class LeaveAtOnce:
    """Ends the process where Python would take itself down: after all threads and all other functions of ``atexit``.

    ``atexit`` calls last what was registered first. So the one object is made when the package is imported, before that
    imports torch: multiprocessing and weakref have functions there that end processes and remove temporary folders.

    Threads of gloo may still be giving back what they have sent. One that asks for the interpreter's lock while Python
    takes itself down is ended by Python in a way that aborts the process ("terminate called without an active
    exception"), seldom, and after all work was done.

    Attributes:
        status: of the process; None leaves the end to Python.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        atexit.register(self._leave)

    def at(self, exit_call: SystemExit) -> None:
        """Take the status of a script that calls ``sys.exit``; a message is left to Python."""
        code = 0 if exit_call.code is None else exit_call.code
        self.status = code if isinstance(code, int) else None

    def _leave(self) -> None:
        if self.status is None:
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
        os._exit(self.status)


LEAVING = LeaveAtOnce()
