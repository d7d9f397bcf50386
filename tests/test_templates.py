"""The Slurm script and the Kubernetes template: bash and YAML understand them, and values arrive where they belong."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import string
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
K8S, SLURM = ROOT / "scripts" / "k8s" / "rayjob.yaml", ROOT / "scripts" / "slurm" / "train.sbatch"
VALUES = {
    "NAME": "my-run",
    "CONFIG": "/w/a.yaml",
    "OVERRIDES": "run.seed=1 run.steps=7",
    "IMAGE": "registry/x:1",
    "CLAIM": "disk",
    "WORKERS": "3",
    "GPUS": "2",
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the script with stand-ins for Slurm's and Ray's commands; every call of ray and dllm-rl is noted."""
    tools, notes = tmp_path / "bin", tmp_path / "notes"
    tools.mkdir()
    commands = {
        "scontrol": "printf '%s\\n' ${SLURM_JOB_NODELIST//,/ }",
        "ray": f'echo "ray $*" >> {notes}; exec sleep 60',
        "sleep": '[ "$1" = 60 ] && exec /bin/sleep 60; /bin/sleep 0.2',
        "hostname": "echo 127.0.0.1",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "dllm-rl": f'echo "dllm-rl $*" >> {notes}; trap "echo saved; exit $CODE" TERM; echo ready; '
        "for i in {1..100}; do /bin/sleep 0.1; done; exit 9",
    }
    for name, body in commands.items():
        path = tools / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    started = []

    def start(*arguments, **environment):
        known = {"PATH": f"{tools}:/usr/bin:/bin", "SETUP": "true", "SLURM_JOB_NODELIST": "node1"}
        process = subprocess.Popen(
            ["bash", str(SLURM), *arguments],
            env=known | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process, notes

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_passes_sigterm_and_the_exit_code_on(slurm, code):
    """The driver is told to stop, and its code is returned."""
    process, _ = slurm("a.yaml", CODE=str(code))
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "saved\n"
    assert process.wait(20) == code


def test_slurm_hands_arguments_and_resources_on(slurm):
    process, notes = slurm(
        "configs/a.yaml",
        "run.seed=1",
        "data.system_prompt=two words",
        CODE="0",
        SLURM_JOB_NODELIST="node1,node2,node3",
        SLURM_CPUS_PER_TASK="16",
        SLURM_GPUS_ON_NODE="4",
        PORT="7000",
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(20) == 0
    lines = notes.read_text().splitlines()
    resources = "--num-cpus=16 --num-gpus=4 --block"
    assert f"ray start --head --node-ip-address=127.0.0.1 --port=7000 {resources}" in lines
    assert f"ray start --address=127.0.0.1:7000 {resources}" in lines
    place = "cluster.kind=ray cluster.address=127.0.0.1:7000 --resume"
    assert f"dllm-rl train configs/a.yaml run.seed=1 data.system_prompt=two words {place}" in lines


def test_slurm_without_a_configuration_says_what_is_missing(slurm):
    process, _ = slurm()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and errors.startswith("error: name a configuration") and errors.count("\n") == 1


def test_the_kubernetes_job_is_valid_yaml_and_holds_the_values():
    template = string.Template(K8S.read_text())  # what envsubst does
    job = yaml.safe_load(template.substitute(VALUES))
    assert (job["kind"], job["apiVersion"], job["metadata"]["name"]) == ("RayJob", "ray.io/v1", "my-run")
    assert job["spec"]["entrypoint"].startswith("dllm-rl train /w/a.yaml cluster.kind=ray")
    assert job["spec"]["entrypoint"].endswith("run.seed=1 run.steps=7 --resume")
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert {workers[key] for key in ("replicas", "minReplicas", "maxReplicas")} == {3}
    container = workers["template"]["spec"]["containers"][0]
    assert container["image"] == "registry/x:1" and container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in workers["template"]["spec"]["volumes"]}


def test_the_command_of_the_header_names_every_variable_of_the_template():
    text = K8S.read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    used = set(re.findall(r"\$(\w+)", body))
    listed = re.search(r"envsubst '([^']+)'", text)
    assert listed is not None and set(re.findall(r"\w+", listed[1])) == used == set(VALUES)
