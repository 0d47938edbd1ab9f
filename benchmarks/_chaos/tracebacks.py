"""What a worker does first: it can be asked by a signal where each of its threads is, even if none of them goes on."""

import faulthandler
import signal

faulthandler.register(signal.SIGUSR1, all_threads=True)
