"""The dllm-rl command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import dllm_rl
from dllm_rl.cli.errors import exit_code
from dllm_rl.errors import UserError

# Heavy imports (torch, transformers) happen inside the commands: a misspelt key is reported in a fraction of a second.
app = typer.Typer(
    help="Reinforcement learning and post-training for diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, for example learner.lr=2e-6")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


def _json_path(path: Path | None) -> Path | None:
    """Before any work: can the result be written there?

    Raises:
        UserError: the folder is missing, or the path is a folder.
    """
    if path is not None and path.is_dir():
        raise UserError(f"--json {path}: is a folder; name a file")
    if path is not None and not path.absolute().parent.is_dir():
        raise UserError(f"--json {path}: the folder '{path.absolute().parent}' does not exist; make it first")
    return path


JsonPath = Annotated[
    Path | None, typer.Option("--json", callback=_json_path, help="write the result there, for machines")
]


def _version(show: bool) -> None:
    if show:
        print(dllm_rl.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Reinforcement learning and post-training for diffusion language models."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    from_checkpoint: Annotated[str | None, typer.Option("--from", help="go on from this one: step-000040")] = None,
    json: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """Train. Example: dllm-rl train configs/sudoku4_rl.yaml run.seed=1 learner.lr=3e-5."""
    from dllm_rl.cli.output import evaluation_table, stdout, write_json
    from dllm_rl.config.load import load_config

    loaded = load_config(config, overrides or [])
    from dllm_rl.cli.signals import terminated
    from dllm_rl.train import train as run

    with terminated() as stop:
        summary = run(loaded, resume=resume, from_checkpoint=from_checkpoint, progress=_progress(quiet), stop=stop)
    evaluations = [("before", e) for e in summary.before] + [("after", e) for e in summary.after]
    if evaluations:
        stdout().print(evaluation_table("held-out", evaluations))
    print(f"{summary.steps} steps; everything is in {summary.folder}")
    if summary.steps < loaded.run.steps:
        print(f"stopped after step {summary.steps} of {loaded.run.steps} as asked; go on with --resume")
    write_json(
        json,
        {
            "folder": str(summary.folder),
            "steps": summary.steps,
            "before": [e.summary() for e in summary.before],
            "after": [e.summary() for e in summary.after],
            "seconds": dict(summary.seconds),
        },
    )


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="YAML file inside the working directory")],
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="of the Ray dashboard; default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265"),
    ] = None,
    working_dir: Annotated[Path, typer.Option(help="its code and configurations are uploaded")] = Path("."),
    runtime_env: Annotated[Path | None, typer.Option(help="YAML with more of Ray's runtime environment")] = None,
    include: Annotated[list[str] | None, typer.Option(help="upload these files too, e.g. 'prompts/*.txt'")] = None,
    max_upload_mb: Annotated[float, typer.Option(min=0, help="refuse to upload more")] = 100.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be uploaded, and stop")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    wait: Annotated[bool, typer.Option(help="stream the log and return the job's exit code")] = True,
) -> int:
    """Train on a Ray cluster. Example: dllm-rl submit configs/tiny_sudoku_ray.yaml --address http://head:8265."""
    from dllm_rl.config.load import load_config

    loaded = load_config(config, overrides or [])  # a typing error is known here, not in a job's log
    from dllm_rl.cli.submit import run_submit

    return run_submit(
        config,
        overrides or [],
        loaded,
        address=address,
        working_dir=working_dir,
        runtime_env=runtime_env,
        include=include or [],
        max_upload_mb=max_upload_mb,
        dry_run=dry_run,
        resume=resume,
        wait=wait,
    )


@app.command(name="eval")
def evaluate(
    target: Annotated[Path, typer.Argument(help="YAML file, or a run folder (its newest checkpoint)")],
    overrides: Overrides = None,
    json: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate on held-out examples. Example: dllm-rl eval runs/sudoku4-rl evaluate.limit=1000."""
    from dllm_rl.cli.output import evaluation_table, stdout, write_json
    from dllm_rl.driver.evaluate_target import evaluate_target

    results = evaluate_target(target, overrides or [], _progress(quiet))
    stdout().print(evaluation_table(str(target), [("", e) for e in results]))
    write_json(json, {"target": str(target), "evaluations": [e.summary() for e in results]})


@app.command()
def show_config(config: Annotated[Path, typer.Argument(help="YAML file")], overrides: Overrides = None) -> None:
    """Print the resolved configuration; it is a valid input itself."""
    from dllm_rl.config.load import dump, load_config
    from dllm_rl.reports.provenance import provenance

    print(dump(load_config(config, overrides or []).model_copy(update={"provenance": provenance()})), end="")


@app.command()
def check_plugin(
    kind: Annotated[str | None, typer.Argument(help="algorithms, engines, strategies, rewards, tasks, ...")] = None,
    name: Annotated[str | None, typer.Argument(help="registered name, or package.module:Name")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="options of the plugin: name=value")] = None,
    json: JsonPath = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="show failures only")] = False,
) -> int:
    """Hold plugins to their contracts. Example: dllm-rl check-plugin algorithms my_package.my_file:MyMethod."""
    from dllm_rl.cli.check import run_checks

    return run_checks(kind, name, options or [], json, quiet)


@app.command()
def draws(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    vary: Annotated[str | None, typer.Option(help="option of the algorithm and its values: pairs=1,2,4")] = None,
    rows: Annotated[int, typer.Option(min=2, help="completions to look at")] = 32,
    redraws: Annotated[int, typer.Option(min=4, help="independent draws of all masks")] = 32,
    plot: Annotated[Path | None, typer.Option(help="write the curve there, .png or .svg")] = None,
    json: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """How many draws does the likelihood need? Example: dllm-rl draws configs/sudoku4_rl.yaml algorithm.name=espo."""
    from dllm_rl.config.load import load_config

    loaded = load_config(config, overrides or [])
    from dllm_rl.cli.draws import run_draws

    run_draws(loaded, vary, rows=rows, redraws=redraws, plot=plot, json_path=json, progress=_progress(quiet))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="seed of everything")] = 0,
    output: Annotated[Path, typer.Option(help="folder for the two runs")] = Path("runs"),
    json: JsonPath = None,
    quiet: Quiet = False,
) -> None:
    """Teach a tiny model 4x4 Sudoku, then to decode it in parallel with reinforcement learning (a few minutes)."""
    from dllm_rl.cli.demo import run_demo

    run_demo(seed, output, json, _progress(quiet))


def _progress(quiet: bool) -> Any:
    from dllm_rl.cli.progress import RichProgress
    from dllm_rl.reports.progress import Quiet as Silent

    return Silent() if quiet else RichProgress(Console(stderr=True))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit code: 0 done, 2 user error, 3 stopped by a limit of section drift, 1 crash, 130 interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = app(args=arguments, standalone_mode=False)
    except Exception as error:  # the one place where every exception becomes an exit code
        return _usage_error(error)
    if result == 130:  # typer turns Ctrl-C into this
        return exit_code(KeyboardInterrupt())
    return result if isinstance(result, int) else 0


def _usage_error(error: Exception) -> int:
    if isinstance(error, typer.Abort):
        return exit_code(KeyboardInterrupt())
    message = getattr(error, "format_message", None)  # typer's usage errors; their class moves between versions
    if message is not None:
        print(f"error: {message()}; see dllm-rl --help", file=sys.stderr)
        return 2
    return exit_code(error)


def entry() -> None:
    """Console script."""
    sys.exit(main())
