"""Submits a run to a Ray cluster as a job."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dllm_rl.errors import UserError, first_line, require_package

EXCLUDED = ("runs/", ".git/", ".venv/", "venv/", "__pycache__/", "*.pt", "*.safetensors")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
RETRY_S = 2.0  # a head node that restarts refuses connections for seconds
ATTEMPTS = 30  # a dashboard that is silent for about a minute is given up


def run_submit(
    config: Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    working_dir: Path,
    runtime_env: Path | None,
    resume: bool,
    wait: bool,
) -> int:
    """Upload the working directory, run ``dllm-rl train`` on the cluster, and stream its log.

    Args:
        config: inside the working directory.
        overrides: of the configuration.
        address: of the cluster's dashboard; None takes RAY_API_SERVER_ADDRESS, else this machine's.
        working_dir: uploaded; must hold the configuration and whatever it names by a relative path.
        runtime_env: YAML file with more of Ray's runtime environment (pip, env_vars).
        resume: pass --resume on.
        wait: stream the log until the job ends.
    Returns:
        the job's exit code; 0 if it goes on without us.
    Raises:
        UserError: no such file, no cluster, or a runtime environment that is not one.
    """
    require_package("ray", "ray", "dllm-rl submit")
    from ray.job_submission import JobSubmissionClient

    root = working_dir.resolve()
    if not config.resolve().is_relative_to(root):
        raise UserError(f"'{config}' is not inside '{root}', which is what is uploaded; move it, or set --working-dir")
    environment: dict[str, Any] = {"working_dir": str(root), "excludes": list(EXCLUDED)}
    if runtime_env is not None:
        more = yaml.safe_load(runtime_env.read_text(encoding="utf-8"))
        if not isinstance(more, dict):
            raise UserError(f"'{runtime_env}' must hold a mapping such as 'pip: [...]' or 'env_vars: {{...}}'")
        environment |= more
    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    relative = config.resolve().relative_to(root)
    command = ["python", "-m", "dllm_rl", "train", str(relative), *overrides, *(["--resume"] if resume else [])]
    try:
        client = JobSubmissionClient(where)
        job = client.submit_job(entrypoint=shlex.join(command), runtime_env=environment)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no Ray dashboard answers at '{where}' ({first_line(error)}); start the cluster with 'ray start --head', "
            f"or give --address http://host:8265"
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
