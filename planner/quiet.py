"""Silence around native code that prints: standard output holds our results."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def redirected(number: int, stream: object) -> Iterator[None]:
    """Send what is written to file descriptor `number`, that of `stream`, to the log at level debug."""
    flush = getattr(stream, "flush", lambda: None)
    flush()
    try:
        before = os.dup(number)
    except OSError:  # closed, as in a service: there is nobody to be kept from it
        yield
        return
    with tempfile.TemporaryFile() as told:
        os.dup2(told.fileno(), number)
        try:
            yield
        finally:
            flush()
            os.dup2(before, number)
            os.close(before)
            told.seek(0)
            note(told.read().decode(errors="replace"))


def note(text: str) -> None:
    """Log what was said, at level debug."""
    if text.strip():
        log.debug("%s", text.strip())
