"""The screen: results on stdout, progress and messages on stderr, as a terminal, a log or a program wants them."""
from __future__ import annotations

import os
import sys
import time
from typing import Any

from stream_reshard.errors import ResourceError
from stream_reshard.machine.memory import human, resident

_LOG_SECONDS, _LOG_PART = 30.0, 0.1
"""A log gets a line of progress after this time, and after this part of the work if that took `_LEAST_SECONDS`."""
_LEAST_SECONDS = 2.0

_SILENCERS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Environment variables that switch progress off; any value but an empty one, 0 and false does."""


def say(text: str) -> None:
    """Print to stdout. Nothing is lost where a pipe is closed: its reader wants no more. Raises ResourceError where
    stdout takes nothing for another reason."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # The rest of the buffer goes there.
        if not isinstance(error, BrokenPipeError):
            raise ResourceError(f"standard output: {error.strerror}") from error


def tell(text: str) -> None:
    """Print to stderr. Where nobody listens the exit code has to do."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def error_word() -> str:
    """"error:", in red on a terminal, unless NO_COLOR is set (no-color.org)."""
    return "\x1b[1;31merror:\x1b[0m" if _is_terminal() and not os.environ.get("NO_COLOR") else "error:"


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Progress of one phase of a command: a bar on a terminal, a line now and then in a log. Called with (done, total).
    """

    def __init__(self, title: str, unit: str, is_quiet: bool):
        """`unit`: "B" for bytes, else the name of a counted thing."""
        self._title, self._unit = title, unit
        self._bar: Any = None
        self._is_silent = is_quiet or any(
            os.environ.get(name, "").lower() not in ("", "0", "false") for name in _SILENCERS)
        self._begin = self._logged = time.monotonic()
        self._logged_part = -1.0

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` is done."""
        if self._is_silent:
            return
        if _is_terminal():
            self._draw(done, total)
        else:
            self._log(done, total)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm
            look: dict[str, Any] = {"unit": self._unit}
            if self._unit == "B":
                look = {"unit": "iB", "unit_scale": True, "unit_divisor": 1024}
            columns, lines = os.get_terminal_size(sys.stderr.fileno())
            if not columns or not lines:  # As under script(1) and `docker exec -t`: a bar would be nothing there.
                look |= {"ncols": columns or 80, "nrows": lines or 24}
            self._bar = tqdm(total=total, file=sys.stderr, desc=self._title, disable=False, **look)
        self._bar.total = total
        if self._bar.update(done - self._bar.n):  # Only a bar that was drawn just now: memory is dear to count.
            self._bar.set_postfix_str(f"memory {human(resident())}", refresh=False)

    def _log(self, done: int, total: int) -> None:
        now, part = time.monotonic(), done / max(total, 1)
        elapsed = now - self._logged
        is_due = elapsed > _LOG_SECONDS or (part - self._logged_part >= _LOG_PART and elapsed > _LEAST_SECONDS)
        if not (is_due or self._logged_part < 0 or (part >= 1 and self._logged_part < 1)):
            return
        seconds = max(now - self._begin, 1e-9)
        left = f", about {seconds / part - seconds:.0f} s left" if 0 < part < 1 and seconds > _LEAST_SECONDS else ""
        amounts = [human(done), human(total)] if self._unit == "B" else [str(done), f"{total} {self._unit}s"]
        rate = f", {human(done / seconds)}/s" if self._unit == "B" else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        tell(f"{when} {self._title} {part:.0%}, {amounts[0]} of {amounts[1]}{rate}{left}, memory {human(resident())}")
        self._logged, self._logged_part = now, part

    def __exit__(self, *reason: object) -> None:
        if self._bar is not None:
            self._bar.close()
