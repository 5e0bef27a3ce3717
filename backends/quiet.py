"""Silence around compilers that talk: what they print goes to the log, at level debug."""

import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

__all__ = ["quietly"]

_TALKATIVE = ("torchao", "torch.utils._pytree", "torch.export", "executorch", "nncf")
log = logging.getLogger(__name__)


@contextmanager
def quietly(*, errors_too: bool = False) -> Iterator[None]:
    """Keep foreign compilers from standard output, which holds our results, and their notices from our users.

    Native code prints too, so the file descriptor itself is redirected as well; that of standard error only if
    `errors_too`, and then briefly, since our own progress goes there.
    """
    loggers = [(each, each.level) for each in map(logging.getLogger, _TALKATIVE)]
    streams = [sys.stdout, sys.stderr] if errors_too else [sys.stdout]
    told = io.StringIO()
    with ExitStack() as stack:
        stack.callback(lambda: _log(told.getvalue()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stdout(told))
        for number, stream in enumerate(streams, start=1):
            stack.enter_context(_redirected(number, stream))
        try:
            for logger, _ in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in loggers:
                logger.setLevel(level)


@contextmanager
def _redirected(number: int, stream: object) -> Iterator[None]:
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
            _log(told.read().decode(errors="replace"))


def _log(text: str) -> None:
    if text.strip():
        log.debug("%s", text.strip())
