"""Sources that fail in the process that reads them."""

import os
import signal

from pixelgen_fast.data.source import Source


class Deadly(Source):
    """Ends the process."""

    def prepare(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


class Broken(Source):
    """Has a fault of its own."""

    def prepare(self, i):
        raise KeyError(i)
