"""The commands on a small run: what they print, write and return."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from transformers import AutoTokenizer

from dllm_rl.cli.main import main
from dllm_rl.config.load import load_config
from dllm_rl.reports.run_folder import comparable


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_everything_behind(finished_run):
    metrics = records(finished_run / "metrics.jsonl")
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2]
    assert {"reward", "reward/sudoku", "tokens_per_forward", "grad_norm", "rollout_s", "step_s"} <= set(metrics[0])
    assert [row["step"] for row in metrics if "eval/4_per_step/success" in row] == [2]
    samples = records(finished_run / "samples.jsonl")
    assert {"prompt", "completion", "reward", "uid", "status"} <= set(samples[0]) and len(samples) == 8
    assert (finished_run / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (finished_run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    config = load_config(finished_run / "config.yaml")
    assert config.run.steps == 2 and {"versions", "git"} <= set(config.provenance or {})


def test_train_writes_json_and_says_where_everything_is(write, tmp_path, capsys):
    path = tmp_path / "result.json"
    changes = {"evaluate": {"limit": 6, "tokens_per_step": [1, 4]}}
    assert main(["train", str(write(changes)), "run.steps=1", "--json", str(path)]) == 0
    shown = capsys.readouterr()
    assert "1 steps; everything is in" in shown.out and "held-out" in shown.out
    result = json.loads(path.read_text())
    assert result["steps"] == 1 and result["folder"] == str(tmp_path / "runs" / "run")
    assert [e["tokens_per_step"] for e in result["before"]] == [e["tokens_per_step"] for e in result["after"]] == [1, 4]
    assert {"setup_s", "step_s", "evaluate_s", "checkpoint_s"} <= set(result["seconds"])


def test_quiet_is_quiet(write, capsys):
    assert main(["train", str(write()), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_resume_goes_on_and_says_what_changed(finished_run, write, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "runs" / "run")
    assert main(["train", str(write()), "run.steps=3", "learner.lr=0.002", "--resume"]) == 0
    assert "learner.lr 0.001 -> 0.002" in capsys.readouterr().err
    steps = [row["step"] for row in records(tmp_path / "runs" / "run" / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3]


def test_from_goes_back(finished_run, write, tmp_path):
    shutil.copytree(finished_run, tmp_path / "runs" / "run")
    assert main(["train", str(write()), "--from", "step-000001", "--quiet"]) == 0
    assert comparable(finished_run) == comparable(tmp_path / "runs" / "run"), (
        "step 2 again, from the checkpoint of step 1"
    )


def test_eval_of_a_run_is_the_last_evaluation_of_its_training(finished_run, tmp_path, capsys):
    path = tmp_path / "eval.json"
    assert main(["eval", str(finished_run), "--json", str(path), "--quiet"]) == 0
    (evaluation,) = json.loads(path.read_text())["evaluations"]
    last = records(finished_run / "metrics.jsonl")[-1]
    assert evaluation["success"] == last["eval/4_per_step/success"]
    assert evaluation["tokens_per_forward"] == last["eval/4_per_step/tokens_per_forward"]
    assert evaluation["components"]["format"] == last["eval/4_per_step/format"]
    assert "tokens per forward" in capsys.readouterr().out


def test_eval_writes_every_completion_with_its_verdicts(finished_run, write, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    options = ["evaluate.tokens_per_step=[2,8]", "--json", str(tmp_path / "e.json"), "--quiet"]
    assert main(["eval", str(run), *options]) == 0
    rows = records(run / "eval-step-000002.jsonl")
    assert [row["tokens_per_step"] for row in rows] == [2] * 6 + [8] * 6
    for evaluation in json.loads((tmp_path / "e.json").read_text())["evaluations"]:
        own = [row for row in rows if row["tokens_per_step"] == evaluation["tokens_per_step"]]
        assert sum(row["solved"] for row in own) / 6 == evaluation["success"]
        assert sum(row["rewards"]["format"] for row in own) / 6 == pytest.approx(evaluation["components"]["format"])
        tokens, forwards = (sum(row[name] for row in own) for name in ("completion_tokens", "num_forwards"))
        assert tokens / forwards == evaluation["tokens_per_forward"]
    assert all(row["prompt"] and len(row["answer"]) == 16 and row["status"] in ("ok", "invalid") for row in rows)
    path = tmp_path / "said.jsonl"
    assert main(["eval", str(write()), "evaluate.limit=2", "--samples", str(path), "--quiet"]) == 0
    assert len(records(path)) == 2 and not list(tmp_path.glob(".*.tmp"))


def test_a_run_ends_with_a_table_of_its_figures(write, capsys):
    assert main(["train", str(write({"evaluate": {"at_start": False, "at_end": False}})), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "first 5" in printed and all(name in printed for name in ("reward", "loss", "grad_norm", "step_s"))


def test_eval_builds_nothing_that_only_training_needs(write, tmp_path, capsys, monkeypatch):
    """No optimiser (and with it no master weights), no reference, no value model: they cost several models' memory."""
    for name, algorithm in (
        ("policy", {"name": "coupled_grpo", "beta": 0.1}),
        ("value", {"name": "trace_rl", "value": True}),
    ):
        config = write(
            {"run.name": name, "run.steps": 1, "algorithm": algorithm, "learner.reference": {"kind": "frozen"}}
        )
        assert main(["train", str(config), "--quiet", "--json", str(tmp_path / "train.json")]) == 0
        trained = json.loads((tmp_path / "train.json").read_text())["after"]

        def built(*args, **options):
            raise AssertionError("only training needs it")

        with monkeypatch.context() as patch:
            for part in ("dllm_rl.learner.torch_learner.Optimizer", "dllm_rl.learner.torch_learner.ValueModel"):
                patch.setattr(part, built)
            folder = str(tmp_path / "runs" / name)
            assert main(["eval", folder, "--quiet", "--json", str(tmp_path / "eval.json")]) == 0, (
                capsys.readouterr().err
            )
        found = json.loads((tmp_path / "eval.json").read_text())["evaluations"]
        assert [e | {"seconds": 0} for e in found] == [e | {"seconds": 0} for e in trained]


def test_eval_of_a_configuration_takes_overrides(write, tmp_path):
    path = tmp_path / "eval.json"
    arguments = ["evaluate.limit=3", "evaluate.tokens_per_step=[2,8]", "--json", str(path), "--quiet"]
    assert main(["eval", str(write()), *arguments]) == 0
    evaluations = json.loads(path.read_text())["evaluations"]
    assert [(e["tokens_per_step"], e["scored"]) for e in evaluations] == [(2, 3), (8, 3)]
    assert not (tmp_path / "runs").exists(), "evaluation leaves no run behind"


def test_the_shown_configuration_is_a_valid_input(write, tmp_path, capsys):
    assert main(["show-config", str(write()), "run.seed=5"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(shown).run.seed == 5 and "provenance" in yaml.safe_load(shown.read_text())


def test_data_without_held_out_rows_trains_without_evaluation(write, tmp_path, capsys):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data.task": {"name": "rows", "train_file": str(tmp_path / "a.jsonl"), "success": "format"},
        "rewards": [{"name": "format", "pattern": "[0-9]"}],
        "reward_pool": {"self_test": 0},
        "model.init.tokenizer": "characters",
    }
    assert main(["train", str(write(changes))]) == 0
    assert "no held-out examples" in capsys.readouterr().err


def test_conversations_train_through_a_chat_template_that_is_kept(write, tmp_path, capsys):
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    said = [{"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]}] * 4
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    changes = {
        "data.task": {"name": "rows", "train_file": str(tmp_path / "a.jsonl")},
        "data.chat_template": str(tmp_path / "own.jinja"),
        "model.init.tokenizer": "byte_bpe",
        "model.init.vocab_size": 300,
        "algorithm": {"name": "masked_sft"},
        "rewards": None,
    }
    assert main(["train", str(write(changes)), "--quiet"]) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "runs/run/checkpoints/step-000002/model")
    assert saved.apply_chat_template(said[0]["prompt"], tokenize=False) == "u:hi;"
    changes["data.chat_template"] = str(tmp_path / "no.jinja")
    assert main(["train", str(write(changes)), "run.name=other", "--quiet"]) == 2
    assert "data.chat_template: no file" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(write, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dllm_rl.train.build_run", interrupted)
    assert main(["train", str(write()), "--quiet"]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["plan"], ["show-config"], ["check-plugin"], ["demo"]])
def test_help(command, capsys):
    assert main([*command, "--help"]) == 0
    assert "Usage:" in capsys.readouterr().out


def test_version(capsys):
    import dllm_rl

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == dllm_rl.__version__
