"""What submit uploads: the run's files and none of the secrets that lie about, on real folders."""

from __future__ import annotations

import json
import os

import pytest

from dllm_rl.cli.main import main
from dllm_rl.cli.secrets import secret_line
from dllm_rl.cli.upload import choose
from dllm_rl.errors import UserError

SECRETS = (
    *(".env", ".env.local", "prod.env", ".netrc", ".git-credentials", ".pypirc", ".npmrc", "package/.env"),
    *(".ssh/id_rsa", ".ssh/config", ".aws/credentials", ".kube/config", ".docker/config.json", ".huggingface/token"),
    *("server.pem", "server.key", "id_ed25519", "id_deploy", "package/id_rsa", "kubeconfig.yaml", "kubeconfig"),
    *("hf_token.txt", "token", "wandb_token.yaml", "package/TOKEN.json", "my-service-account.json", "secrets.yaml"),
    *("service_account_key.json", "package/credentials.toml", "password.txt", "wandb_api_key.txt", "secrets.py"),
)
WANTED = {
    *("run.yaml", "base.yml", "rewards.py", "package/__init__.py", "package/token_counts.py", "package/words.json"),
    *("pyproject.toml", "requirements.txt", "data/train.jsonl", "model/tokenizer.json", "model/model.safetensors"),
}
UNWANTED = (
    *("runs/old/config.yaml", ".git/config", "venv/pyvenv.cfg", "venv/lib/x.py", "notes.txt", "data/other.jsonl"),
    *("weights/big.safetensors", "__pycache__/x.py", "package/layer.pt", "elsewhere/out/config.yaml"),
)
VALUES = {
    "run": {"name": "x", "output": "elsewhere/out"},
    "model": {"path": "model"},
    "data": {"task": {"name": "jsonl", "train_file": "data/train.jsonl", "test_file": None}},
    "rewards": [{"name": "rewards:mine"}],
}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "work"
    for name in (*SECRETS, *WANTED, *UNWANTED):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return folder


def names(upload):
    return {str(path) for path in upload.files}


def test_the_run_is_uploaded_and_no_secret(root):
    assert names(choose(root, VALUES, limit_mb=1)) == WANTED


def test_what_is_asked_for_is_added_and_secrets_stay(root):
    found = choose(root, VALUES, include=["*"], limit_mb=1)
    assert names(found) - WANTED == {"notes.txt", "data/other.jsonl", "weights/big.safetensors", "package/layer.pt"}
    assert {"server.pem", "hf_token.txt", ".env"} <= {str(path) for path in found.refused}


def test_excludes_of_the_user_are_added_to_ours(root):
    found = choose(root, VALUES, excluded=lambda path: path.startswith("package/"), limit_mb=1)
    assert names(found) == {name for name in WANTED if not name.startswith("package/")}


def test_links_are_not_followed_out_of_the_folder_nor_to_a_secret(root, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "x.py").write_text("x")
    (root / "linked").symlink_to(tmp_path / "private")
    (root / "linked.py").symlink_to(tmp_path / "private" / "x.py")
    (root / "harmless.py").symlink_to(root / ".env")
    (root / "again.py").symlink_to("rewards.py")
    (root / "broken.py").symlink_to("nowhere/in.py")
    found = choose(root, VALUES, limit_mb=1)
    assert names(found) == WANTED | {"again.py"}
    assert {str(path) for path in found.outside} == {"linked", "linked.py", "broken.py"}
    copy = tmp_path / "copy"
    found.copy_to(copy)
    assert (copy / "again.py").read_text() == "x" and not (copy / "again.py").is_symlink()
    assert {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()} == names(found)


def with_file(name):
    return VALUES | {"data": {"task": {"name": "jsonl", "train_file": name}}}


def test_named_data_that_is_refused_is_said(root, tmp_path):
    (tmp_path / "far.jsonl").write_text("x")
    (root / "data" / "near.jsonl").symlink_to(tmp_path / "far.jsonl")
    with pytest.raises(UserError, match=r"data.task.train_file = hf_token.txt: is named like a secret"):
        choose(root, with_file("hf_token.txt"), limit_mb=1)
    with pytest.raises(UserError, match=r"data.task.train_file = data/near.jsonl: leads out of the working directory"):
        choose(root, with_file("data/near.jsonl"), limit_mb=1)


def test_too_much_is_refused_with_the_largest_file(root):
    (root / "model" / "model.safetensors").write_bytes(bytes(3_000_000))
    with pytest.raises(
        UserError, match=r"11 files of .* are 3 MB, more than --max-upload-mb 2; the largest is model/mod"
    ):
        choose(root, VALUES, limit_mb=2)


# In parts, so that no scanner of this repository takes them for keys.
KEYS = (
    "tracker: {api_" + "key: 0123456789abcdef0123456789abcdef01234567}",
    "login('hf" + "_abcdefghijklmnopqrstuvwxyzABCDEFGH')",
    "-----BEGIN RSA PRIVATE" + " KEY-----",
    json.dumps({"type": "service_account", "private_key": "-----BEGIN PRIVATE" + " KEY-----\\n"}),
    "aws = 'AKIA" + "ABCDEFGHIJKLMNOP'",
    "os.environ['OPENAI_API_KEY'] = 'sk" + "-abcdefghijklmnopqrstuvwxyz0123456789'",
)


@pytest.mark.parametrize("text", KEYS)
def test_a_key_inside_a_file_is_refused_with_its_line(root, text):
    (root / "rewards.py").write_text(f"# mine\n{text}\n")
    with pytest.raises(UserError, match=r"rewards.py, line 2: holds what looks like a key"):
        choose(root, VALUES, limit_mb=1)


def test_ordinary_text_holds_no_key():
    text = (
        "tokens_per_step: 4\nsecret = None\nkey = sorted(keys)\nsha256: " + "ab" * 32 + "\napi_key: ${WANDB_API_KEY}\n"
    )
    assert secret_line(text) == 0


def test_a_dry_run_lists_the_files_and_contacts_nobody(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    config = write()
    (tmp_path / ".env").write_text("x")
    (tmp_path / "hf_token.yaml").write_text("x")
    command = ["submit", str(config), "--working-dir", str(tmp_path), "--dry-run"]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "uploading 1 files, 0.0 MB" in err and "config.yaml" in err
    assert "left out, named like secrets: hf_token.yaml" in err


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["run.output=runs"], None, "run.output = runs: a relative path is inside the job's copy"),
        ([], "working_dir: .", "would be uploaded whole"),
        ([], "py_modules: [../mine]", "would be uploaded whole"),
        ([], "excludes: data", "excludes must be a list"),
        (["run.name=hf" + "_abcdefghijklmnopqrstuvwxyzABCDEFGH"], None, "an override holds what looks like a key"),
    ],
)
def test_what_would_lose_or_give_away_is_one_line_and_exit_code_2(
    write, tmp_path, capsys, arguments, environment, message
):
    extra = []
    if environment is not None:
        (tmp_path / "environment.yaml").write_text(environment)
        extra = ["--runtime-env", str(tmp_path / "environment.yaml")]
    command = ["submit", str(write()), *arguments, "--working-dir", str(tmp_path), "--dry-run", *extra]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_secrets_in_the_environment_of_a_job_are_named_and_not_shown(write, tmp_path, capsys):
    file = tmp_path / "environment.yaml"
    file.write_text("env_vars: {WANDB_API_KEY: abc123, OMP_NUM_THREADS: '1'}\nexcludes: ['*.yaml']")
    command = ["submit", str(write()), "--working-dir", str(tmp_path), "--dry-run", "--runtime-env", str(file)]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "dashboard can read the env_vars of a job: WANDB_API_KEY\n" in err and "abc123" not in err
    assert "uploading 0 files" in err
    assert os.path.exists(file)
