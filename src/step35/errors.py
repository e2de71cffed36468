"""The exception tree. Every error a user can cause says what was wrong, the value, what is allowed, what to do.

The command line prints the message of a `Step35Error` without a traceback and exits with `exit_code`;
any other exception is a bug and keeps its traceback. It lives beside the folders, not in one, because the
lowest of them (`config/`) raises it too.
"""


class Step35Error(Exception):
    """Base of all errors that a user can cause and can cure."""

    exit_code = 2


class ConfigError(Step35Error, ValueError):
    """A setting that is unknown, out of range, or contradicts another one."""


class CheckpointError(Step35Error):
    """A folder that is not a checkpoint, or one with missing, misshapen or truncated tensors."""


class HubError(CheckpointError):
    """An address on the hub that is none, does not exist, or cannot be reached."""


class DataError(Step35Error):
    """Input data that cannot be used at all (single bad files are skipped and counted instead)."""


class DiskFullError(Step35Error):
    """A write failed for lack of space; whatever was published before it is intact."""

    exit_code = 28  # ENOSPC


class RunLockedError(Step35Error):
    """Another process is writing the same run directory."""

    exit_code = 75  # EX_TEMPFAIL: the same command may work later


class DivergedError(Step35Error):
    """Training produced a loss or gradient that is not finite."""

    exit_code = 3
