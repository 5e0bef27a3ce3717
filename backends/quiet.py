"""Silence around compilers that talk: what they print goes to the log, at level debug."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

from planner.quiet import note, redirected

__all__ = ["quietly"]

_TALKATIVE = ("torchao", "torch.utils._pytree", "torch.export", "executorch", "nncf")


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
        stack.callback(lambda: note(told.getvalue()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stdout(told))
        for number, stream in enumerate(streams, start=1):
            stack.enter_context(redirected(number, stream))
        try:
            for logger, _ in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in loggers:
                logger.setLevel(level)
