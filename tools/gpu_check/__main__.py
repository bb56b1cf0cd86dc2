"""``python -m tools.gpu_check``."""

import signal
import sys

from tools.gpu_check.command import main

if __name__ == "__main__":
    # Ended from outside, as by a limit of time, it ends what it has started, too: those are in sessions of their own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
