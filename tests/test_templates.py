"""The Slurm and Kubernetes templates: they render to what bash and YAML understand, and refuse wrong values."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
RENDER = [sys.executable, str(SCRIPTS / "render.py")]
K8S, SLURM = SCRIPTS / "k8s" / "rayjob.yaml", SCRIPTS / "slurm" / "train.sbatch"


def rendered(template, *values):
    return subprocess.run([*RENDER, str(template), *values], capture_output=True, text=True)


def test_the_slurm_script_is_valid_bash_and_holds_the_values(tmp_path):
    done = rendered(SLURM, "nodes=3", "gpus=4", "config=configs/a.yaml", "overrides=run.seed=1 run.steps=7")
    assert done.returncode == 0, done.stderr
    script = tmp_path / "job.sbatch"
    script.write_text(done.stdout)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    for wanted in ("#SBATCH --nodes=3", "--gpus-per-node=4", "dllm-rl train configs/a.yaml", "run.seed=1 run.steps=7"):
        assert wanted in done.stdout
    assert "${nodes[0]}" in done.stdout and "$$" not in done.stdout, "shell variables stay"


def test_the_slurm_script_passes_sigterm_and_the_exit_code_on(tmp_path):
    """With stand-ins for Slurm's and Ray's commands: the driver is told to stop, and its code is returned."""
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "scontrol": "echo node1",
        "ray": "exec sleep 60",
        "sleep": '[ "$1" = 60 ] && exec /bin/sleep 60; true',
        "hostname": "echo 127.0.0.1",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "dllm-rl": 'trap "echo saved; exit $CODE" TERM; echo ready; for i in {1..100}; do /bin/sleep 0.1; done; exit 9',
    }
    for name, body in commands.items():
        path = tools / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(rendered(SLURM, "nodes=1", "config=a.yaml", "setup=true").stdout)
    for code in (0, 3):
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node1", "CODE": str(code)}
        process = subprocess.Popen(
            ["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.terminate()
            assert process.stdout.readline() == "saved\n"
            assert process.wait(20) == code
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_kubernetes_job_is_valid_yaml_and_holds_the_values():
    done = rendered(K8S, "image=registry/x:1", "config=/w/a.yaml", "claim=disk", "workers=3", "gpus=2")
    assert done.returncode == 0, done.stderr
    job = yaml.safe_load(done.stdout)
    assert (job["kind"], job["apiVersion"]) == ("RayJob", "ray.io/v1")
    assert job["spec"]["entrypoint"].startswith("dllm-rl train /w/a.yaml cluster.kind=ray")
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers["replicas"] == 3
    container = workers["template"]["spec"]["containers"][0]
    assert container["image"] == "registry/x:1" and container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in workers["template"]["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["image=x", "config=a"], "error: give a value for claim=..."),
        (["image=x", "config=a", "claim=d", "nodes=2"], "error: no place for nodes; the template takes name, config"),
        (["image"], "error: 'image' is not name=value"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(values, message):
    done = rendered(K8S, *values)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_defaults_can_be_listed():
    listed = rendered(SLURM, "--list").stdout.splitlines()
    assert "config (needed)" in listed and "nodes=2" in listed
