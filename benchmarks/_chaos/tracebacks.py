"""Preload of workers: on a signal a worker logs the stacks of its threads, even if all of them are blocked."""

import faulthandler
import signal

faulthandler.register(signal.SIGUSR1, all_threads=True)
