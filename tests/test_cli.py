"""The command line as a user meets it: real processes, and for every kind of wrong input one helpful line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from many_commands import run_commands
from slow_cases import slow_after

from batchmix import __version__, cli
from batchmix.config import JOBS

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

ROOT = Path(__file__).parents[1]
GIVEN = ("data.path=prompts.jsonl", "output.dir=out")

# Arguments after `batchmix generate data.path=prompts.jsonl output.dir=out`, and what the one line says.
WRONG_OVERRIDES = {
    "data.pth=x": "data.pth: no such key, did you mean data.path?",
    "data.xyz=1": "data.xyz: no such key; data has path, format, split,",
    "model=mistral_8x7b": "model=mistral_8x7b: no such choice, did you mean mixtral_8x7b?",
    "model=/models/mixtral": "a file or folder is given as model.path=/models/mixtral",
    "data=prompts.jsonl": "a file or folder is given as data.path=prompts.jsonl",
    "model.dtype=bf16": "model.dtype=bf16: must be one of auto, bfloat16, float16, float32",
    "sampling.max_tokens=many": "sampling.max_tokens=many: must be an integer",
    "sampling.stop=END": "sampling.stop=END: must be a list of texts, written [a,b] or null",
    "sampling.logit_bias=3": "sampling.logit_bias=3: must be a mapping from integers to numbers",
    "output.dir=${nothing}": "output.dir: Interpolation key 'nothing' not found",
    "sampling.top_p=2": "sampling.top_p=2.0 must be above 0 and at most 1",
    "data.path=[a": "data.path=[a: the value cannot be read; a text with special characters needs quotes",
    "data.path=a.jsonl,b.jsonl": "write data.path=[a.jsonl,b.jsonl] if it is a list",
    "best_of=3": "best_of: no such key; there is no best-of; sampling.n answers come out",
    "data.template=It's {{ x }}": "a text with special characters needs quotes, \"data.template='It\\'s {{ x }}'\"",
    # From here on in the slow suite alone (QUICK).
    "+data.pth=x": "data.pth: no such key, did you mean data.path?",
    "max_tokens=4": "max_tokens: no such key, did you mean sampling.max_tokens?",
    "sampling.max_token=4": "sampling.max_token: no such key, did you mean sampling.max_tokens?",
    "modle=tiny": "modle: no such key, did you mean model?",
    "zzz=1": "zzz: no such key; keys begin with model, data, sampling,",
    "hydra.foo=1": "hydra.foo: Hydra has no such key",
    "hydra/launcher=nowhere": "hydra/launcher=nowhere: no such choice; the choices are basic",
    "output.redo=all": "output.redo=all: must be one of length, error or null",
    "data.on_error=stop": "data.on_error=stop: must be one of record, raise",
    "sampling.max_tokens=1.5": "sampling.max_tokens=1.5: must be an integer",
    "sampling.max_tokens=null": "sampling.max_tokens=null: must be an integer",
    "sampling.temperature=hot": "sampling.temperature=hot: must be a number",
    "sampling.ignore_eos=maybe": "sampling.ignore_eos=maybe: must be true or false",
    "sampling.stop=[[END]]": "sampling.stop must be a list of texts",
    "sampling.stop_token_ids=[a]": "sampling.stop_token_ids must be a list of integers",
    "sampling.logit_bias={a:1}": "sampling.logit_bias must be a mapping from integers to numbers, written {3:1.5}",
    "output.dir=null": "output.dir=null: must be text",
    "output.flush_seconds=nan": "output.flush_seconds=nan: must be above 0",
    "sampling.temperature=inf": "sampling.temperature=inf is no number",
    "output.dir=": "output.dir=: give a folder, for example output.dir=out",
    "sampling.top_p=1e-46": "sampling.top_p=1e-46 is no number of float32, as which it is used",
    "sampling.logit_bias={5:1e39}": "sampling.logit_bias has 1e+39 for token 5; at most 1e+30 either way",
    "shard.index=3": "shard.index=3: must be from 0 to shard.count - 1 = 0",
    "prompts.jsonl": "prompts.jsonl: not of the form key=value, for example data.path=prompts.jsonl",
    "sampling.guided_json=x": "sampling.guided_json: no such key; here it is sampling.structured_outputs.json",
    "lora=adapter": "lora: no such key; LoRA adapters are not loaded; merge one first",
    "data.text_column=x": "data.text_column: no such key; here it is data.prompt_column",
    "data.path=s3://b/day=1/x": "a text with special characters needs quotes, \"data.path='s3://b/day=1/x'\"",
    "data.system_prompt=Hello, you": "quote it if it is one text, \"data.system_prompt='Hello, you'\"",
}
WRONG_LINES = {
    ("generate",): (1, "data.path and output.dir must be given, for example data.path=prompts.jsonl output.dir=out"),
    ("generate", "output.dir=out"): (1, "data.path must be given, for example data.path=prompts.jsonl"),
    ("generate", "data.path=prompts.jsonl"): (1, "output.dir must be given, for example output.dir=out"),
    ("plan", "data.path=prompts.jsonl", "plan.expected_tokens=-5"): (1, "plan.expected_tokens=-5: must be at least 1"),
    ("plan", "data.path=prompts.jsonl", "plan.histogram=lengths.png"): (
        1,
        "plan.histogram=lengths.png: must end in .svg or .html; no other picture is drawn",
    ),
    ("plan", "data.path=prompts.jsonl", "plan.histogram=s3://b/x.svg"): (
        1,
        "plan.histogram=s3://b/x.svg: the picture is written on this machine; give the path",
    ),
    ("generate", *GIVEN, "plan.gpu=h100"): (
        1,
        "plan: batchmix generate does not read it; its keys begin with model, data, ",
    ),
    ("tune", "model=tiny"): (1, "model: batchmix tune does not read it; its keys begin with tune"),
    ("plan",): (1, "data.path must be given, for example data.path=prompts.jsonl"),
    ("generate", *GIVEN, "--config-dir", "nowhere"): (1, "nowhere' not found"),
    ("generate", *GIVEN, "--config-name", "nowhere"): (1, "Cannot find primary config 'nowhere'"),
    ("generate", *GIVEN, "--frobnicate"): (2, "--frobnicate: no such option; keys are given as key=value"),
    ("generate", "--model=x"): (2, "--model=x: keys are given as key=value; write model.path=... (see batchmix"),
    ("generate", *GIVEN, "--max-model-len=9"): (2, "--max-model-len=9: keys are given as key=value; write model.max"),
    ("generate", *GIVEN, "--output-file=o"): (2, "--output-file=o: keys are given as key=value; write output.dir=..."),
    ("generate", *GIVEN, "--lora-modules=a"): (2, "--lora-modules=a: LoRA adapters are not loaded"),
    ("generate", *GIVEN, "--multirun", "sampling.temperature=0,0.7"): (
        1,
        "output.dir=out: each job of this --multirun needs a folder of its own, for example"
        " 'output.dir=out/${sampling.temperature}'",
    ),
    ("generate", *GIVEN, "--multirun", "shard.idx=0,1"): (1, "shard.idx: no such key, did you mean shard.index?"),
    ("annotate", *GIVEN): (1, "annotate.input is not set: name a task, as in batchmix annotate sentiment"),
    ("annotate", "sentimnt", *GIVEN): (1, "annotate=sentimnt: no such choice, did you mean sentiment?"),
    ("annotate", "nowhere.yaml", *GIVEN): (
        1,
        "nowhere.yaml: cannot be read as a task file (No such file or directory)",
    ),
    ("benchmark", "speed"): (
        1,
        "benchmark.name=speed: no such benchmark; there are kernels, throughput, peers and offload",
    ),
    ("generate", *GIVEN, "hydra/launcher=slurm"): (1, "hydra/launcher=slurm: "),  # needs submitit, or --multirun
    (): (
        2,
        "no job given; the jobs are annotate, benchmark, convert, evaluate, export, finalize, generate, plan, report, review, status, tune",
    ),
    ("genrate",): (2, "genrate: no such job, did you mean generate?"),
    ("data.path=prompts.jsonl",): (2, "the job comes first, as in batchmix generate data.path=prompts.jsonl"),
    **{("generate", *GIVEN, override): (1, line) for override, line in WRONG_OVERRIDES.items()},
}

QUICK = len(WRONG_LINES) - len(WRONG_OVERRIDES) + 15  # the slow suite runs the others, too

# A job that does what its data.path says, so that the ways out of a real job can be tried without a model.
JOB = """
import sys
from pathlib import Path
from batchmix.storage import LocalFolder
from batchmix.errors import BatchmixError, Interrupted
from batchmix.hydra_app import job, save_hydra_files

@job("generate")
def main(config):
    save_hydra_files(config, LocalFolder(Path(config.output.dir)))
    if config.data.path == "user_error":
        raise BatchmixError("model.path=nowhere: no such folder")
    if config.data.path == "bug":
        raise ValueError("a bug")
    if config.data.path == "interrupted" and config.shard.index == 1:
        raise Interrupted("SIGTERM")
    print("ran", config.shard.index, config.shard.count, config.data.path, flush=True)

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Done]:
    """Every wrong line of this run's tests run once, in one empty folder."""
    folder = tmp_path_factory.mktemp("wrong")
    tests = [item for item in request.session.items if item.name.startswith("test_wrong_input_prints_one_helpful_line")]
    lines = [item.callspec.params["arguments"] for item in tests if isinstance(item, pytest.Function)]
    done = run_commands([("batchmix", *arguments) for arguments in lines], folder)
    assert list(folder.iterdir()) == [], "a refused command left files behind"
    return dict(zip(lines, done, strict=True))


@pytest.mark.parametrize(
    "arguments", slow_after(QUICK, WRONG_LINES), ids=lambda arguments: " ".join(arguments[-1:]) or "nothing"
)
def test_wrong_input_prints_one_helpful_line(outcomes: dict[tuple[str, ...], Done], arguments: tuple[str, ...]) -> None:
    exit_code, line = WRONG_LINES[arguments]
    done = outcomes[arguments]
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("batchmix: error: ")
    assert done.stderr.count("\n") == 1
    assert line in done.stderr


@pytest.mark.slow  # 5 s and more
def test_a_wrong_experiment_file_is_named(batchmix: Run, tmp_path: Path) -> None:
    experiment = tmp_path / "mine" / "experiment"
    experiment.mkdir(parents=True)
    lines = {
        "key": ("data: {pth: x}", "data.pth: no such key, did you mean data.path? (in experiment/key.yaml)"),
        "value": ("sampling: {max_tokens: many}", "must be an integer (in experiment/value.yaml)"),
        "syntax": ("sampling: {", "experiment/syntax.yaml"),
        "package": ("data: {limit: 3}", "its file must begin with the line `# @package _global_`"),
    }
    for name, (content, line) in lines.items():
        head = "" if name == "package" else "# @package _global_\n"
        (experiment / f"{name}.yaml").write_text(f"{head}{content}\n")
        done = batchmix("generate", *GIVEN, "--config-dir", "mine", f"experiment={name}")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert line in done.stderr


def test_help_lists_the_jobs_at_once(batchmix: Run) -> None:
    batchmix("--help")  # fills the file cache
    start = time.perf_counter()
    done = batchmix("--help")
    assert time.perf_counter() - start < 1  # 0.08 s measured; torch or Hydra would take longer than that on any machine
    assert done.returncode == 0
    for path in (ROOT / "jobs").glob("*.py"):
        assert any(line.split()[:1] == [path.stem] and len(line.split()) > 3 for line in done.stdout.splitlines())


def test_help_imports_nothing_heavy(batchmix: Run) -> None:
    code = "import sys; from batchmix.cli import main; main(['--help']); print(set(sys.modules) & {'torch', 'hydra', 'omegaconf'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_a_job_lets_waiting_threads_sleep_before_torch_is_loaded(tmp_path: Path, given: dict[str, str]) -> None:
    code = (
        "import os, sys; from batchmix.hydra_app import job\n"
        "@job('generate')\n"
        "def main(config): print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))\n"
        "main(['data.path=x', 'output.dir=y'])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | given, cwd=tmp_path
    )
    assert done.stdout.split() == ["False", given.get("GOMP_SPINCOUNT", "None" if given else "1000")], done.stderr


def test_version(batchmix: Run) -> None:
    assert batchmix("--version").stdout == f"batchmix {__version__}\n"


def test_help_of_a_job_shows_every_key(batchmix: Run) -> None:
    done = batchmix("generate", "--help")
    assert done.returncode == 0
    for text in ("usage: batchmix generate", "mixtral_8x7b_instruct", "max_tokens: 1024", "path: ???"):
        assert text in done.stdout


def test_help_into_a_pipe_that_closes_early() -> None:
    command = [sys.executable, "-m", "batchmix", "generate", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "work.py"
    path.write_text(JOB)
    return path


def run_job(job_file: Path, *arguments: str) -> Done:
    command = [sys.executable, str(job_file), *arguments]
    return subprocess.run(command, cwd=job_file.parent, capture_output=True, text=True, timeout=120)


def test_a_job_that_ends_well(job_file: Path) -> None:
    done = run_job(job_file, *GIVEN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran 0 1 prompts.jsonl\n", "")
    saved = {path.name: yaml.safe_load(path.read_text()) for path in (job_file.parent / "out/.hydra").iterdir()}
    assert set(saved) == {"config.yaml", "overrides.yaml"}
    assert saved["overrides.yaml"] == list(GIVEN)
    assert saved["config.yaml"]["data"]["path"] == "prompts.jsonl"
    assert {path.name for path in job_file.parent.iterdir()} == {"work.py", "out"}


def test_a_users_error_is_one_line(job_file: Path) -> None:
    done = run_job(job_file, "data.path=user_error", "output.dir=out")
    assert (done.returncode, done.stderr) == (1, "batchmix: error: model.path=nowhere: no such folder\n")


def test_a_bug_keeps_its_traceback(job_file: Path) -> None:
    done = run_job(job_file, "data.path=bug", "output.dir=out")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert f'{job_file}", line ' in done.stderr
    assert done.stderr.endswith("ValueError: a bug\n")


@pytest.mark.slow  # 5 s and more
def test_multirun_runs_every_job(job_file: Path) -> None:
    done = run_job(job_file, *GIVEN, "--multirun", "shard.index=range(0,3)", "shard.count=3")
    assert (done.returncode, done.stdout) == (0, "".join(f"ran {index} 3 prompts.jsonl\n" for index in range(3)))
    assert {path.name for path in job_file.parent.iterdir()} == {"work.py", "out"}
    assert len(list((job_file.parent / "out/.hydra").glob("shard-*-of-3/config.yaml"))) == 3


def test_multirun_over_folders_leaves_nothing_elsewhere(job_file: Path) -> None:
    done = run_job(job_file, "data.path=prompts.jsonl", "output.dir=a,b", "--multirun")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in job_file.parent.iterdir()} == {"work.py", "a", "b"}


@pytest.mark.slow  # 5 s and more
def test_multirun_goes_on_after_a_users_error(job_file: Path) -> None:
    done = run_job(job_file, "output.dir=out/${data.path}", "--multirun", "data.path=one,user_error,two")
    assert (done.returncode, done.stdout) == (1, "ran 0 1 one\nran 0 1 two\n")
    assert "batchmix: error: job 1: model.path=nowhere: no such folder\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interruption_asks_to_be_requeued_and_ends_a_multirun(job_file: Path) -> None:
    done = run_job(
        job_file, "data.path=interrupted", "output.dir=out", "--multirun", "shard.index=0,1,2", "shard.count=3"
    )
    assert (done.returncode, done.stdout) == (75, "ran 0 3 interrupted\n")
    assert done.stderr.endswith("batchmix: interrupted by SIGTERM, run the same command again for the rest\n")
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # 5 s and more
def test_the_job_file_is_the_same_app(tmp_path: Path) -> None:
    overrides = {"data": "data.path=[a,b]", "output": "output.dir=out", "sampling": "sampling=greedy"}
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    given = [(*(text for group, text in overrides.items() if group in JOBS[job.stem]), "--cfg", "job") for job in jobs]
    by_file = run_commands([(str(job), *some) for job, some in zip(jobs, given, strict=True)], tmp_path)
    by_name = run_commands([("batchmix", job.stem, *some) for job, some in zip(jobs, given, strict=True)], tmp_path)
    for one, other in zip(by_file, by_name, strict=True):
        assert (one.returncode, one.stderr) == (0, "")
        assert one.stdout == other.stdout != ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "batchmix ",
            set("annotate benchmark convert evaluate export finalize generate plan report review status tune".split()),
        ),
        ("batchmix gen", {"generate"}),
        ("batchmix generate sampling=", {"sampling=default", "sampling=greedy"}),
        ("batchmix generate data.path=x out", {"output=", "output."}),
        ("batchmix plan shard.i", {"shard.index="}),
    ],
)
def test_the_shell_completes(line: str, expected: set[str], batchmix: Run) -> None:
    done = batchmix("-sc", "query=bash", env={**os.environ, "COMP_LINE": line})
    assert (done.returncode, set(done.stdout.split())) == (0, expected), done.stderr


def test_completion_installs(batchmix: Run) -> None:
    assert "hydra_bash_completion" in batchmix("-sc", "install=bash").stdout


def test_help_is_there_for_a_job_without_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare.py").write_text("x = 1\n")
    monkeypatch.setattr(cli, "JOBS", tmp_path)
    assert "  bare  \n" in cli.help_text(["bare"])
