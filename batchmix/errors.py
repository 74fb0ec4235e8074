"""Errors that a user can cause and mend."""

from batchmix.redact import redact


class BatchmixError(Exception):
    """One line that names the key, the value and the remedy; shown without a traceback, exit code 1.

    It is redacted here, so that no secret of a URL gets out, wherever it is written.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class Interrupted(BaseException):
    """SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 arrived: what is finished has been committed, run the command again for the rest.

    No Exception, as KeyboardInterrupt is none: it can come while a file is read, whose errors are caught and renamed.
    """
