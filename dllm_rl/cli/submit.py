"""Submits a run to a Ray cluster as a job."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dllm_rl.cli.secrets import secret_line, secret_variable
from dllm_rl.cli.upload import choose
from dllm_rl.config.schema import Config
from dllm_rl.errors import UserError, first_line, require_package

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
RETRY_S = 2.0  # a head node that restarts refuses connections for seconds
ATTEMPTS = 30  # a dashboard that is silent for about a minute is given up


def run_submit(
    config: Path,
    overrides: Sequence[str],
    loaded: Config,
    *,
    address: str | None,
    working_dir: Path,
    runtime_env: Path | None,
    include: Sequence[str],
    max_upload_mb: float,
    dry_run: bool,
    resume: bool,
    wait: bool,
) -> int:
    """Upload what the run needs, run ``dllm-rl train`` on the cluster, and stream its log.

    Args:
        config: inside the working directory.
        overrides: of the configuration.
        loaded: the configuration with them.
        address: of the cluster's dashboard; None takes RAY_API_SERVER_ADDRESS, else this machine's.
        working_dir: holds the code, the configuration and whatever it names by a relative path; see upload.choose.
        runtime_env: YAML file with more of Ray's runtime environment (pip, env_vars, excludes).
        include: patterns of further files to be uploaded.
        max_upload_mb: more is refused.
        dry_run: say what would be uploaded, and do nothing.
        resume: pass --resume on.
        wait: stream the log until the job ends.
    Returns:
        the job's exit code; 0 if it goes on without us.
    Raises:
        UserError: no such file, no cluster, secrets, or a runtime environment that is not one.
    """
    require_package("ray", "ray", "dllm-rl submit")
    root = working_dir.resolve()
    if not config.resolve().is_relative_to(root):
        raise UserError(f"'{config}' is not inside '{root}', which is what is uploaded; move it, or set --working-dir")
    _check_output(loaded.run.output)
    environment = _environment(runtime_env)
    if any(secret_line(text) for text in overrides):
        raise UserError("an override holds what looks like a key; everybody sees a job's command: use the environment")
    # Private: the rules by which Ray itself would read the excludes.
    from ray._private.thirdparty.pathspec import PathSpec  # codespell:ignore thirdparty

    excluded = PathSpec.from_lines("gitwildmatch", environment.pop("excludes", [])).match_file
    upload = choose(root, loaded.model_dump(mode="json"), include=include, excluded=excluded, limit_mb=max_upload_mb)
    for line in upload.lines(everything=dry_run):
        print(line, file=sys.stderr)
    if dry_run:
        return 0
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    relative = config.resolve().relative_to(root)
    command = ["python", "-m", "dllm_rl", "train", str(relative), *overrides, *(["--resume"] if resume else [])]
    # Ray uploads a folder whole: it gets one that holds nothing else.
    with tempfile.TemporaryDirectory(prefix="dllm-rl-submit-") as folder:
        upload.copy_to(Path(folder))
        try:
            client = JobSubmissionClient(where)
            job = client.submit_job(entrypoint=shlex.join(command), runtime_env={**environment, "working_dir": folder})
        except (ConnectionError, RuntimeError) as error:
            raise UserError(
                f"no Ray dashboard answers at '{where}' ({first_line(error)}); start the cluster with "
                f"'ray start --head', or give --address http://host:8265"
            ) from error
    print(f"job {job} at {where}", file=sys.stderr)
    if not wait:
        return 0
    try:
        return _exit_code(job, _follow(client, job))
    except KeyboardInterrupt:
        print(
            f"detached; the job goes on. Its log: ray job logs {job} --follow --address {where}; to end it: ray job "
            f"stop {job} --address {where}",
            file=sys.stderr,
        )
        return 0


def _check_output(output: str) -> None:
    """Refuse an output folder that goes with the job."""
    if not output.startswith(("/", "~", "$")):
        raise UserError(
            f"run.output = {output}: a relative path is inside the job's copy of the working directory, which is "
            f"removed with the job; set run.output=/a/path/that/all/nodes/share"
        )


def _environment(file: Path | None) -> dict[str, Any]:
    """A user's runtime environment, without anything that would be uploaded unseen."""
    if file is None:
        return {}
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"'{file}' must hold a mapping such as 'pip: [...]' or 'env_vars: {{...}}'")
    modules = found.get("py_modules") or []
    if "working_dir" in found or any("://" not in str(module) for module in modules):
        raise UserError(
            f"'{file}': working_dir and local py_modules would be uploaded whole; give --working-dir, and put modules "
            f"inside it"
        )
    excludes = found.get("excludes", [])
    if not isinstance(excludes, list) or not all(isinstance(pattern, str) for pattern in excludes):
        raise UserError(f"'{file}': excludes must be a list of patterns, such as ['data/*.csv']")
    secret = [name for name in found.get("env_vars") or {} if secret_variable(str(name))]
    if secret:
        print(
            f"warning: everybody who sees the cluster's dashboard can read the env_vars of a job: {', '.join(secret)}",
            file=sys.stderr,
        )
    return found


def _follow(client: Any, job: str) -> Any:
    """Print the log until the job has ended, and return what is known of it.

    The log's connection may break, and the dashboard be away, meanwhile.
    """
    shown, failures = 0, 0
    while True:
        try:
            shown = asyncio.run(_tail(client, job, shown))
            info = client.get_job_info(job)
            if info.status.is_terminal():
                return info
            failures = 0
        except Exception as error:  # of requests, of aiohttp, of Ray: whatever it is, the job is not to be given up
            failures += 1
            if failures > ATTEMPTS:
                raise UserError(
                    f"the dashboard has not answered {failures} times ({first_line(error)}); job {job} may well go on: "
                    f"ask 'ray job status {job}', and do not submit it again before it has ended"
                ) from error
        time.sleep(RETRY_S)


async def _tail(client: Any, job: str, shown: int) -> int:
    """Print what the log has beyond its first ``shown`` characters, and return how many it has."""
    seen = 0
    try:
        async for lines in client.tail_job_logs(job):  # always from the beginning
            print(lines[max(shown - seen, 0) :], end="", flush=True)
            seen += len(lines)
    except Exception:
        if seen <= shown:  # else some of it came, and the rest is asked for again
            raise
    return max(seen, shown)


def _exit_code(job: str, info: Any) -> int:
    if str(info.status) == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:  # it never started, or was stopped
        print(f"error: job {job} {info.status}: {info.message}", file=sys.stderr)
        return 1
    return int(info.driver_exit_code)
