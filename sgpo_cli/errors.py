"""Errors for people: what is wrong, where, what to do next, and the exit code a script can act on.

Every class is one row of the exit-code table in the README. `cli.py` prints them as two lines
(`error: ...`, `hint: ...`) and exits; anything else that reaches it is a bug of ours (exit code 1).
"""


class SgpoError(Exception):
    """A failure that a user can act on; `hint` says how."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(SgpoError):
    """A flag, a recipe or an input file is wrong."""

    exit_code = 2


class IncompleteError(SgpoError):
    """The work ended with too few good rows; what was done is kept."""

    exit_code = 3


class IntegrityError(SgpoError):
    """A file is not what its manifest says."""

    exit_code = 4


class StaleError(SgpoError):
    """The output directory belongs to another request."""

    exit_code = 5


class RemoteError(SgpoError):
    """A remote service refused: key, quota, model name, budget."""

    exit_code = 6


class ResourceError(SgpoError):
    """Disk or memory ran out, or a worker was lost."""

    exit_code = 7


class DivergedError(SgpoError):
    """Training went wrong: NaN, a wrong reference model, or no usable checkpoint."""

    exit_code = 8


class StoppedError(SgpoError):
    """The guard stopped a round: its pairs or the model made from them would do harm; the last good model stands."""

    exit_code = 9


class LockedError(SgpoError):
    """Another process works on the same output directory."""

    exit_code = 11
