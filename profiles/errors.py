"""The few errors of espalier; each message says what, the value, and the remedy."""


class EspalierError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback and exits with 2."""


class ProfileError(EspalierError):
    """A device profile is unknown, malformed, or does not say what was asked of it: one line for each reason given."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class PlanError(EspalierError):
    """A model cannot be planned, trained or cut as asked, or a plan, table or weight file does not fit it."""


class BackendUnavailable(EspalierError):
    """A runtime is not installed, or the device that it needs is absent."""


class BuildError(EspalierError):
    """A rebuilt or compiled model does not do what the masked model does; it is refused, never shipped."""
