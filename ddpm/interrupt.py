"""Being asked to stop: a signal, or hours that are nearly over, become a wish that is granted where leaving costs nothing.

What can be done again (a drawing, a measurement, the wait for a batch) runs inside `abandonable()` and ends at once; a step and
a save are seen to their end.
"""

import contextlib
import os
import signal
import time

BEGAN = time.monotonic() - time.process_time()  # of this process, nearly: so far it has hardly waited
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)  # the last is our own alarm clock
SLACK, MOST_SLACK = 0.02, 60  # share of the hours, and seconds at most, that are left unused


class Interrupted(BaseException):
    """Work that may be abandoned is abandoned, as the process is asked to stop; `told` where the other ranks know it."""

    def __init__(self, told=False):
        super().__init__()
        self.told = told


class Wish:
    """Whether this process is asked to stop: `by` is the signal's number, or None.

    With `hours` above 0 it asks itself, so long before that many hours after its start that what it sees to its end, as far as
    seen, fits in twice.
    """

    def __init__(self, hours=0.0):
        self.hours, self.by, self.longest = hours, None, 0.0
        self.leaving = False

    @property
    def asked(self):
        return self.by is not None

    @property
    def late(self):
        """True where it is the hours that are over."""
        return self.by == signal.SIGALRM

    def __str__(self):
        return f"as train.max_hours={self.hours:g} is nearly over" if self.late else f"asked by {signal.Signals(self.by).name}"

    @contextlib.contextmanager
    def heard(self):
        """Inside, signals become the wish, but for those that are ignored, as by nohup; a second Ctrl-C does not wait."""
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
        """What runs inside ends with Interrupted, between any two of Python's instructions, when the wish comes or is there."""
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
        before, self.leaving = self.leaving, may
        try:
            yield
        finally:
            self.leaving = before

    def _ask(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.by = number
            with contextlib.suppress(OSError):  # print may be what is interrupted
                os.write(2, f"stopping, {self}: saving first\n".encode())
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
