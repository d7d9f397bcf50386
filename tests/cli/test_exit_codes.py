"""Exit codes and the one line of a user error."""

from __future__ import annotations

import pytest

from dllm_rl.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["train"], "Missing argument"),
        (["train", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
        (["show-config", "configs/tiny_gsm8k.yaml", "learner.lrr=1"], "nearest is 'learner.lr'"),
        (["train", "configs/tiny_gsm8k.yaml", "--json", "/no/such/folder/x.json"], "does not exist"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_two(capsys, arguments, words):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_shown_configuration_succeeds(capsys):
    assert main(["show-config", "configs/tiny_gsm8k.yaml", "run.seed=5"]) == 0
    assert "seed: 5" in capsys.readouterr().out
