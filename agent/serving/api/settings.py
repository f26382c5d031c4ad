"""What can be changed while the server runs, as Triton's logging and trace extensions have it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from agent.serving.answers import Refusal
from agent.serving.api.descriptions import NO_TRACE
from agent.serving.api.parameters import shown

Document = dict[str, Any]

FLAGS = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
MAX_VERBOSE = 2**31 - 1


class LogSettings:
    """Which lines are logged. `root` is the logger whose handlers write them; a restart forgets what was changed."""

    def __init__(self, root: logging.Logger | None = None) -> None:
        self._root = root or logging.getLogger()
        level = self._root.getEffectiveLevel()
        self._flags = {name: level <= number for name, number in FLAGS.items()}
        self._verbose = int(level <= logging.DEBUG)

    def document(self) -> Document:
        return {"log_file": "", **self._flags, "log_verbose_level": self._verbose, "log_format": "default"}

    def change(self, wanted: Mapping[str, object]) -> Document:
        """All of `wanted` or nothing; the settings as they are then. None stands for the setting as it is.  Raises: Refusal
        (400, 501).
        """
        flags, verbose = dict(self._flags), self._verbose
        for name, value in wanted.items():
            if value is None:
                continue
            if name in flags:
                if not isinstance(value, bool):
                    raise Refusal(400, f"{name} is {shown(value)}; expected true or false")
                flags[name] = value
            elif name == "log_verbose_level":
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_VERBOSE:
                    raise Refusal(400, f"{name} is {shown(value)}; expected a whole number, 0 for nothing verbose")
                verbose = value
            elif name == "log_file":
                if value != "":
                    raise Refusal(501, "log_file cannot be set: this server logs to standard error, which the journal keeps")
            elif name == "log_format":
                if value != "default":
                    raise Refusal(501, f"log_format {shown(value)} is not offered: there is 'default'")
            else:
                known = ", ".join(self.document())
                raise Refusal(400, f"{shown(name)} is not a log setting; there are {known}")
        self._apply(flags, verbose)
        return self.document()

    def _apply(self, flags: dict[str, bool], verbose: int) -> None:
        self._flags, self._verbose = flags, verbose
        levels = [number for name, number in FLAGS.items() if flags[name]]
        self._root.setLevel(logging.DEBUG if verbose else min(levels, default=logging.CRITICAL))
        for handler in self._root.handlers:
            if self._passes not in handler.filters:
                handler.addFilter(self._passes)

    def _passes(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO:
            return self._verbose > 0
        if record.levelno >= logging.CRITICAL:
            return True
        name = (
            "log_info" if record.levelno < logging.WARNING else "log_warning" if record.levelno < logging.ERROR else "log_error"
        )
        return self._flags[name]


class TraceSettings:
    """Whether requests are traced is decided by agent.yaml, and these settings say so: asking for what is so is granted,
    anything else refused.
    """

    def __init__(self, ratio: float) -> None:
        self._now: Document = dict(NO_TRACE)
        if ratio > 0:
            self._now |= {"trace_level": ["TIMESTAMPS"], "trace_rate": str(round(1 / ratio)), "trace_mode": "opentelemetry"}

    def document(self) -> Document:
        return dict(self._now)

    def change(self, wanted: Mapping[str, object]) -> Document:
        """`wanted` holds strings, lists of them, or None for the default.  Raises: Refusal (400, 501)."""
        now = self.document()
        for name, value in wanted.items():
            if name not in now:
                raise Refusal(400, f"{shown(name)} is not a trace setting; there are {', '.join(now)}")
            given = [value] if isinstance(value, str) else value
            if given is not None and given != [now[name]] and given != now[name]:
                raise Refusal(
                    501, f"{name} cannot be set to {shown(value)}: serve.traces and serve.trace_ratio in agent.yaml decide"
                )
        return now
