"""Where Hydra ends: it composes `conf/` and the command line into a `Config`, which a job takes as its one argument.

`python jobs/JOB.py` and `batchmix JOB` both come through `job`, so both parse, check and report alike.
Exit codes: 0 done, 1 error, 2 usage, 75 interrupted after committing what was finished (run again for the rest).
"""

from __future__ import annotations

import functools
import io
import os
import shlex
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NoReturn, cast

import hydra.version
import yaml
from hydra import compose, initialize_config_module
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from batchmix.config import JOBS, Config
from batchmix.config_checks import check
from batchmix.config_errors import explain, explain_flags, explain_missing, job_help, known_keys, unread
from batchmix.config_files import check_config_files
from batchmix.distributed import slurm
from batchmix.errors import BatchmixError, Interrupted
from batchmix.input import in_parallel
from batchmix.prompts import aside, read_ahead
from batchmix.redact import forget, redact, redact_tracebacks
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.written_config import (
    hidden_texts,
    hide_environment,
    mark,
    remember_environment,
    to_plain,
    written_override,
)

if TYPE_CHECKING:
    from batchmix.storage import Storage

EXIT_ERROR, EXIT_USAGE, EXIT_REQUEUE, EXIT_KEYBOARD = 1, 2, 75, 130


def job(name: str) -> Callable[[Callable[[Config], None]], Callable[..., int]]:
    """Makes a function of a `Config` the Hydra app with primary config `conf/<name>.yaml`.

    The result takes the arguments (default: those of the process) and returns the exit code.
    """

    def decorate(function: Callable[[Config], None]) -> Callable[..., int]:
        @functools.wraps(function)
        def main(argv: Sequence[str] | None = None) -> int:
            return _run(name, function, sys.argv[1:] if argv is None else argv)

        return main

    return decorate


def first_is(key: str, argv: Sequence[str] | None) -> list[str]:
    """The arguments (default: those of the process); a first one that is a bare word is short for `key=WORD`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].isidentifier():
        arguments[0] = f"{key}={arguments[0]}"
    return arguments


def register(job_name: str) -> None:
    """Put the schemas into Hydra's ConfigStore: `schema` has the groups that the job reads, `default` the keys of one."""
    store = ConfigStore.instance()
    schema = _schema()
    store.store(name="schema", node=OmegaConf.masked_copy(schema, list(JOBS[job_name])))
    for group in ("data", "sampling", "engine", "output", "cluster"):
        store.store(group=group, name="default", node=schema[group])


def to_config(composed: DictConfig, job_name: str) -> Config:
    """The checked dataclasses of a composed configuration; BatchmixError where a key or value is wrong."""
    try:
        if others := sorted(set(map(str, composed)) - set(JOBS[job_name])):  # added by `+group.key=value`
            raise BatchmixError(unread(others[0], job_name))
        remember_environment(composed)
        if missing := OmegaConf.missing_keys(composed):
            raise BatchmixError(explain_missing(missing))
        # Merged once more as plain values, which refuses what Hydra lets pass: keys added by `+key=value`.
        values = OmegaConf.to_container(composed, resolve=True)
        hidden = hide_environment(composed, values)
        unread_groups = {"data": {"path": ""}, "output": {"dir": ""}}  # which have to be given where they are read
        config = cast(Config, OmegaConf.to_object(OmegaConf.merge(_schema(), unread_groups, values)))
        OmegaConf.structured(config)  # refuses what a merge lets pass: lists nested in a list of texts
    except OmegaConfBaseException as error:
        raise BatchmixError(explain(error, job_name)) from error
    config.sampling.logit_bias = config.sampling.logit_bias or None
    if config.sampling.structured_outputs == StructuredOutputs():
        config.sampling.structured_outputs = None
    mark(config, hidden)
    return check(config)


@contextmanager
def composed_job(job_name: str, overrides: Sequence[str]) -> Iterator[Config]:
    """The configuration of a job that runs within the block, as `batchmix JOB overrides` has it. BatchmixError where the
    overrides are wrong. Hydra's global state, which the caller may use, is that of before afterwards."""
    for override in overrides:
        if override.startswith(("-", "hydra")):
            raise BatchmixError(f"{override}: is for the command line; from Python a job runs here and once")
    with _hydra_as_before():
        register(job_name)
        try:
            with initialize_config_module("batchmix.conf", job_name=job_name, version_base="1.3"):
                composed = compose(job_name, list(overrides), return_hydra_config=True)
        except Exception as error:
            if not _is_about_config(error):
                raise
            raise BatchmixError(explain(error, job_name)) from None
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        yield to_config(composed, job_name)


@contextmanager
def _hydra_as_before() -> Iterator[None]:
    instances, resolvers = Singleton._instances, BaseContainer._resolvers
    own: dict[Any, Any] = {kind: one for kind, one in instances.items() if kind not in (GlobalHydra, HydraConfig)}
    own |= {kind: deepcopy(kind.instance()) for kind in (ConfigStore, VersionBase)}
    Singleton._instances, BaseContainer._resolvers = own, dict(resolvers)
    try:
        yield
    finally:
        Singleton._instances, BaseContainer._resolvers = instances, resolvers


def save_hydra_files(config: Config, storage: Storage) -> None:
    """Write `config.yaml` and `overrides.yaml` under `output.dir/.hydra` in `storage`, in a folder of its own for each shard.

    For the job to call once it has accepted the directory; does nothing where the job was not started by Hydra.
    """
    if not HydraConfig.initialized():
        return
    from batchmix.storage import write_text  # imports pyarrow, as the next
    from batchmix.storage.bookkeeping import HYDRA

    folder = HYDRA
    if config.shard.count > 1:
        folder += f"/shard-{config.shard.index}-of-{config.shard.count}"
    storage.make_folder(folder)
    plain, hidden = to_plain(config), hidden_texts(config)
    given: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    overrides = [written_override(override, plain, hidden) for override in given]
    for name, content in {"config.yaml": plain, "overrides.yaml": overrides}.items():
        write_text(storage, f"{folder}/{name}", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _schema() -> DictConfig:
    # `sampling.logit_bias={3:1.5}` needs a mapping to merge into (OmegaConf cannot merge into null) that takes keys
    # it does not have yet, and so do the keys of structured_outputs; `to_config` turns empty ones back into null.
    sampling = SamplingConfig(logit_bias={}, structured_outputs=StructuredOutputs())
    schema = OmegaConf.structured(Config(sampling=sampling))
    OmegaConf.set_struct(schema.sampling.logit_bias, False)
    return cast(DictConfig, schema)


def _run(name: str, function: Callable[[Config], None], argv: Sequence[str]) -> int:
    args_parser = get_args_parser()
    args_parser.prog = f"batchmix {name}"
    args_parser.error = functools.partial(_usage_error, name)  # type: ignore[method-assign]
    # Hydra's own parse_args refuses overrides on both sides of a flag: `a=1 --multirun b=2`.
    args = args_parser.parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        _usage_error(name, "--experimental-rerun does not apply: the same command again finishes what is left")

    started_in = os.getpid()
    failed = composed_all = False

    @functools.wraps(function)  # Hydra names the job after the module of the function
    def task(composed: DictConfig) -> None:
        nonlocal failed, composed_all
        elsewhere = os.getpid() != started_in  # in a launcher's worker
        if elsewhere:
            with suppress(OSError):
                os.rmdir(scratch)  # Hydra has made it here too
        try:
            _check_launcher()
            config = to_config(composed, name)
            composed_all = True
            function(config)
        except BatchmixError as error:
            if elsewhere:  # only the exception crosses to the process that waits
                raise
            # Not raised further, so that the other jobs of a multirun still run.
            failed = True
            _report(error)
        except Interrupted as interrupted:
            reason = f" by {interrupted}" if str(interrupted) else ""
            print(f"batchmix: interrupted{reason}, {slurm.requeue()}", file=sys.stderr)
            if any(
                thread.name.startswith((read_ahead.THREAD_NAME, in_parallel.THREAD_NAME, aside.THREAD_NAME))
                for thread in threading.enumerate()
            ):
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(EXIT_REQUEUE)  # all is committed; Python would wait for what these threads wait for
            sys.exit(EXIT_REQUEUE)

    _let_waiting_threads_sleep()
    forget()  # what an earlier job of this process hid
    redact_tracebacks()
    register(name)
    hydra.version.setbase("1.3")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print and cut to a few frames
    with tempfile.TemporaryDirectory(prefix="batchmix-") as scratch:
        if args.multirun:
            # Hydra wants a folder for its multirun.yaml before any job has accepted its output.dir.
            args.overrides.insert(0, f"hydra.sweep.dir={scratch}")
        try:
            if args.multirun:
                _check_multirun(args.overrides)
            for folder in filter(None, (args.config_dir, args.config_path)):
                check_config_files(folder)
            with _described_help(name) if args.help else nullcontext():
                _run_hydra(args, args_parser, task, config_path="pkg://batchmix.conf", config_name=name)
            sys.stdout.flush()
        except BatchmixError as error:
            _report(error)
            failed = True
        except KeyboardInterrupt:
            jobs = "; the jobs in Slurm's queue go on (squeue shows them, scancel ends them)"
            print(f"batchmix: interrupted{jobs if slurm.is_waiting() else ''}", file=sys.stderr)
            return EXIT_KEYBOARD
        except BrokenPipeError:
            if not (args.help or args.hydra_help or args.cfg or args.info):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
        except RecursionError:
            if composed_all:
                raise
            _report(BatchmixError("an override or a configuration file is nested too deeply; give a file instead of nested"
                                  " values, or fewer of them"))  # fmt: skip
            failed = True
        except Exception as error:
            if (line := slurm.explain(error)) is None:
                if not _is_about_config(error):
                    raise
                line = explain(error, name)
            _report(BatchmixError(line))
            failed = True
    return EXIT_ERROR if failed else 0


def _let_waiting_threads_sleep() -> None:
    """Before torch is loaded: let OpenMP's threads spin for some 0.05 ms where they wait for one another, then sleep.

    GNU OpenMP's default is to spin for milliseconds, which takes from the thread that they wait for the core it needs where
    another process has the others (docs/performance.md). A policy that is set already stays.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


@contextmanager
def _described_help(job_name: str) -> Iterator[None]:
    """Print Hydra's help as `job_help` has it."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:  # Hydra leaves by SystemExit
        print(job_help(text.getvalue(), job_name), end="")


def _check_multirun(overrides: Sequence[str]) -> None:
    """BatchmixError where jobs that differ would have the same output.dir."""
    parser = OverridesParser.create()
    given = [parser.parse_override(override) for override in overrides]
    swept = [override.key_or_group for override in given if override.is_sweep_override()]
    folder = next((override for override in given if override.key_or_group == "output.dir"), None)
    differing = [key for key in swept if key in known_keys() and key not in ("shard.index", "shard.count")]
    if differing and folder is not None and not folder.is_sweep_override() and "${" not in str(folder.value()):
        key = differing[0] if "." in differing[0] else f"hydra:runtime.choices.{differing[0]}"
        override = f"output.dir={folder.value()}/${{{key}}}"
        raise BatchmixError(
            f"output.dir={folder.value()}: each job of this --multirun needs a folder of its own, for example"
            f" {shlex.quote(override)}"
        )


def _check_launcher() -> None:
    """BatchmixError where a launcher is given that would not be used: the model would run on the login node."""
    hydra_config = HydraConfig.get()
    choice = hydra_config.runtime.choices.get("hydra/launcher")
    if hydra_config.mode == RunMode.RUN and choice != "basic":
        raise BatchmixError(
            f"hydra/launcher={choice}: used only with --multirun; add shard.count=16 --multirun shard.index='range(0,16)'"
        )


def _is_about_config(error: Exception) -> bool:
    if isinstance(error, HydraException | OmegaConfBaseException | yaml.YAMLError):
        return True
    # For a few wrong overrides Hydra raises a plain ValueError. One that a worker's job raised comes through
    # JobReturn.return_value and is a bug.
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    in_hydra = str(frame.f_globals.get("__name__")).startswith("hydra.") and frame.f_code.co_name != "return_value"
    return isinstance(error, ValueError) and in_hydra


def _report(error: BatchmixError) -> None:
    hydra_config = HydraConfig.get() if HydraConfig.initialized() else None
    label = f"job {hydra_config.job.num}: " if hydra_config and hydra_config.mode == RunMode.MULTIRUN else ""
    print(f"batchmix: error: {label}{error}", file=sys.stderr)


def _usage_error(name: str, message: str) -> NoReturn:
    unknown, _, flags = message.partition("unrecognized arguments: ")
    if flags and not unknown:
        message = explain_flags(flags.split(), name)
    print(f"batchmix: error: {redact(message)} (see batchmix {name} --help)", file=sys.stderr)
    sys.exit(EXIT_USAGE)
