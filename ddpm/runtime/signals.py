"""Being asked to stop: a signal, or hours that are nearly over, become a wish that is granted where
leaving costs nothing.

What can be done again (a drawing, a measurement, the wait for a batch) runs inside `abandonable()`
and ends at once; a step and a save are seen to their end. Commands other than the training end by
KeyboardInterrupt inside `interruptible()`; before that, while a command imports, `ddpm/__init__.py`
has a signal end the process with one line.
"""

import contextlib
import os
import signal
import sys
import time

from ddpm.common import errors

# of this process, nearly: so far it has hardly waited
BEGAN = time.monotonic() - time.process_time()
NAMES = {signal.SIGINT: "Ctrl-C"}  # of signals, for people
# the last is our own alarm clock
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
SLACK = 0.02
MOST_SLACK = 60  # share of the hours, and seconds at most, that are left unused
GOING_ON = ("ddpm.main", "ddpm.sweep")  # such commands
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what interrupts a command


def interrupted_code():
    """The exit code of this process where it is interrupted, by the command that it runs as
    `python -m`.
    """
    return errors.GOES_ON if any(name in sys.orig_argv for name in GOING_ON) else errors.STOPPED


def tell(text):
    """Write a line to stderr at once, from a signal handler too; on a terminal below the `^C`
    and the bar that stand there.
    """
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
            if interrupted_code() == errors.GOES_ON
            else ": nothing is written"
        )
        tell(f"interrupted before the start{again}")
    end_at_once()


def raise_once(*_):
    """A signal handler that raises KeyboardInterrupt; the next signal ends the process at once."""
    handle(end_at_once)
    raise KeyboardInterrupt


def handle(handler):
    """Let a handler have the signals of ENDING, except those that are ignored, as by nohup;
    returns the handlers before.
    """
    heard = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


@contextlib.contextmanager
def interruptible():
    """Inside, the first signal raises KeyboardInterrupt, so that half-written files are cleaned
    up; the second ends at once.
    """
    before = handle(raise_once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupted(BaseException):
    """Work that may be abandoned is abandoned, as the process is asked to stop; `told` where the
    other ranks know it.
    """

    def __init__(self, told=False):
        super().__init__()
        self.told = told


class Wish:
    """Whether this process is asked to stop: `by` is the signal's number, or None.

    With `hours` above 0 it asks itself, so long before that many hours after its start that what it
    sees to its end, as far as seen, fits in twice.
    """

    def __init__(self, hours=0.0):
        self.hours = hours
        self.by = None
        self.longest = 0.0
        self.leaving = False

    @property
    def asked(self):
        return self.by is not None

    @property
    def late(self):
        """True where it is the hours that are over."""
        return self.by == signal.SIGALRM

    def __str__(self):
        if self.late:
            return f"as train.max_hours={self.hours:g} is nearly over"
        return f"by {NAMES.get(self.by) or signal.Signals(self.by).name}"

    @contextlib.contextmanager
    def heard(self):
        """Inside, signals become the wish, but for those that are ignored, as by nohup; a second
        Ctrl-C does not wait.
        """
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._ask) for number in heard}
        self._set_alarm()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if before[signal.SIGALRM] != self._ask:  # the outermost
                signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def abandonable(self):
        """What runs inside ends with Interrupted, between any two of Python's instructions, when
        the wish comes or is there.
        """
        with self._leaving(True):
            self._grant()
            yield
        if self.asked:  # an exception in a finaliser is lost
            raise Interrupted

    @contextlib.contextmanager
    def whole(self):
        """What runs inside is seen to its end, even inside what is abandonable."""
        with self._leaving(False):
            yield
        self._grant()

    @contextlib.contextmanager
    def allowed_for(self):
        """The alarm leaves room for what takes as long as what runs inside."""
        began = time.monotonic()
        yield
        if (seconds := time.monotonic() - began) > self.longest:
            self.longest = seconds
            self._set_alarm()

    @contextlib.contextmanager
    def _leaving(self, may):
        before = self.leaving
        self.leaving = may
        try:
            yield
        finally:
            self.leaving = before

    def _ask(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.by = number
            tell(f"stopping, {self}: saving first")
            self._grant()

    def _grant(self):
        if self.asked and self.leaving:
            self.leaving = False  # what unwinds is seen to its end
            raise Interrupted

    def _set_alarm(self):
        if self.hours and not self.asked:
            limit = 3600 * self.hours
            end = BEGAN + limit - min(SLACK * limit, MOST_SLACK) - 2 * self.longest
            signal.setitimer(signal.ITIMER_REAL, max(end - time.monotonic(), 0.001))
