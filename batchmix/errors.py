"""Errors that a user can cause and mend."""


class BatchmixError(Exception):
    """One line that names the key, the value and the remedy; shown without a traceback, exit code 1."""


class Interrupted(BaseException):
    """SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 arrived: what is finished has been committed, run the command again for the rest.

    No Exception, as KeyboardInterrupt is none: it can come while a file is read, whose errors are caught and renamed.
    """
