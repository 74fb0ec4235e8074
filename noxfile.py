"""`nox` passes `make test` with each Python that batchmix supports and this machine has: `pip install nox`."""

import nox

nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("python", "-m", "pytest", "-n", "logical", "--dist", "loadfile", env={"PYTHONSAFEPATH": "1"})
