"""Requests to stop: a signal, or a time limit that is nearly reached.

A training looks at its StopRequest between batches, network evaluations of a drawing and batches of
a measurement, and then saves; a step and a save are never cut off. Other commands end by
KeyboardInterrupt inside `interruptible()`; while a command still imports, `ddpm/__init__.py` lets a
signal end the process with one line.
"""

import contextlib
import os
import signal
import sys
import time

from ddpm.common import errors

# when this process started, nearly: until now it has hardly waited
BEGAN = time.monotonic() - time.process_time()
NAMES = {signal.SIGINT: "Ctrl-C"}  # of signals, for people
# the last is our own alarm clock
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
SLACK = 0.02  # share of the hours that is left unused
MOST_SLACK = 60  # seconds of it at most
GOING_ON = ("ddpm.main", "ddpm.sweep")  # such commands
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what interrupts a command


def interrupted_code():
    """The exit code of this process, the command of `python -m`, where it is interrupted."""
    continues = any(name in sys.orig_argv for name in GOING_ON)
    return errors.INTERRUPTED if continues else errors.STOPPED


def tell(text):
    """Write a line to stderr at once, also from a signal handler; on a terminal below the bar."""
    above = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # print may be what is interrupted
        os.write(2, f"{above}{text}\n".encode())


def end_at_once(*_):
    """A signal handler that ends the process where it stands."""
    os._exit(interrupted_code())


def end_before_start(*_):
    """A signal handler for a command that still imports."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of the ranks on a machine the first one says it
        again = (
            ": nothing to save, the same command goes on"
            if interrupted_code() == errors.INTERRUPTED
            else ": nothing is written"
        )
        tell(f"interrupted before the start{again}")
    end_at_once()


def raise_once(*_):
    """A signal handler that raises KeyboardInterrupt; the next signal ends the process at once."""
    handle(end_at_once)
    raise KeyboardInterrupt


def handle(handler):
    """Set the handler of the ENDING signals that are not ignored; returns the handlers before."""
    heard = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


@contextlib.contextmanager
def interruptible():
    """Inside, the first signal raises KeyboardInterrupt; the second ends the process at once."""
    before = handle(raise_once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopTraining(BaseException):
    """Raised where a training looks at its StopRequest; `agreed` if the other ranks stop too."""

    def __init__(self, agreed=False):
        super().__init__()
        self.agreed = agreed


class StopRequest:
    """Whether this process is requested to stop, by a signal or because `hours` are nearly over.

    The time limit leaves twice the longest `reserve_time()` section; 0 hours are no limit.
    """

    def __init__(self, hours=0.0):
        self.hours = hours
        self.signal = None
        self.longest = 0.0
        self.raises = False

    @property
    def requested(self):
        return self.signal is not None

    @property
    def time_limit_reached(self):
        return self.signal == signal.SIGALRM

    def __str__(self):
        if not self.requested:
            return "as another rank does"
        if self.time_limit_reached:
            return f"as train.max_hours={self.hours:g} is nearly over"
        return f"by {NAMES.get(self.signal) or signal.Signals(self.signal).name}"

    def check(self):
        """Raise StopTraining if a stop is requested; called between units that can be repeated."""
        if self.requested:
            raise StopTraining

    @contextlib.contextmanager
    def install_handlers(self):
        """Inside, signals not ignored request the stop; a second Ctrl-C interrupts."""
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._request) for number in numbers}
        self._set_alarm()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if before[signal.SIGALRM] != self._request:  # the outermost
                signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def interruptible(self):
        """Inside, a request raises StopTraining at once: for work that cannot call `check()`."""
        self.check()
        self.raises = True
        try:
            yield
        finally:
            self.raises = False
        self.check()  # an exception that is raised in a finaliser is lost

    @contextlib.contextmanager
    def reserve_time(self):
        """Measure a section that the time limit must not cut off, such as a step or a save."""
        began = time.monotonic()
        yield
        if (seconds := time.monotonic() - began) > self.longest:
            self.longest = seconds
            self._set_alarm()

    def _request(self, number, _):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.signal = number
            tell(f"stopping, {self}: saving first")
            if self.raises:
                self.raises = False
                raise StopTraining

    def _set_alarm(self):
        if self.hours and not self.requested:
            limit = 3600 * self.hours
            end = BEGAN + limit - min(SLACK * limit, MOST_SLACK) - 2 * self.longest
            signal.setitimer(signal.ITIMER_REAL, max(end - time.monotonic(), 0.001))
