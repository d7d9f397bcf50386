"""Reference scores computed beforehand: the same bits as computed on the way, found again by the next run."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.config.schema import Config
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.loading import load_denoiser
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.train import train


def config(folder, name, changes=None, **learner):
    tiny = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_length": 40}
    values = {
        "run": {"name": name, "steps": 4, "output": str(folder), "threads": 1},
        "model": {"family": "tiny", "init": tiny},
        "data": {"task": {"name": "sudoku4", "train_puzzles": 20, "test_puzzles": 4}, "prompts_per_step": 3},
        "sampling": {"max_new_tokens": 16},
        "algorithm": {"name": "vrpo"},
        "learner": {"lr": 1e-2} | learner,
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every_steps": 2},
    }
    for section, options in (changes or {}).items():
        values[section] |= options
    return Config.model_validate(values)


def weights(summary, step=4):
    model, _ = load_denoiser(summary.folder / f"checkpoints/step-{step:06d}/model", family="tiny")
    return dict(model.module.named_parameters())


@pytest.fixture
def scored(monkeypatch):
    """The number of reference scores so far, as a list of one entry each."""
    calls, score = [], TorchLearner.score

    def counted(self, batch, masks, *, reference=False, **options):
        if reference:
            calls.append(self.step)
        return score(self, batch, masks, reference=reference, **options)

    monkeypatch.setattr(TorchLearner, "score", counted)
    return calls


def test_precomputed_references_give_the_same_bits_and_are_found_again(tmp_path, scored):
    on_the_way = weights(train(config(tmp_path, "a")))
    assert scored == [0, 1, 2, 3]
    scored.clear()
    cache = str(tmp_path / "cache")
    first = train(config(tmp_path, "b", precompute_reference=True, reference_cache=cache))
    assert scored == [0, 0, 0, 0], "all before the first step"
    scored.clear()
    again = train(config(tmp_path, "c", precompute_reference=True, reference_cache=cache, lr=2e-2))
    assert scored == [], "another learning rate needs the same scores"
    for name, value in on_the_way.items():
        assert torch.equal(value, weights(first)[name]), name
    assert any(not torch.equal(value, weights(again)[name]) for name, value in on_the_way.items())


@pytest.mark.parametrize(
    "other",
    [
        {"data": {"task": {"name": "sudoku4", "train_puzzles": 24, "test_puzzles": 4}}},
        {"model": {"init": {"hidden_size": 64, "num_heads": 4}}},
        {"algorithm": {"draws": 4}},
    ],
    ids=["tokens", "weights", "draws"],
)
def test_other_tokens_weights_or_draws_need_other_scores(tmp_path, scored, other):
    cache = {"precompute_reference": True, "reference_cache": str(tmp_path / "cache")}
    train(config(tmp_path, "a", **cache))
    scored.clear()
    train(config(tmp_path, "b", other, **cache))
    assert len(scored) == 4


def test_resume_computes_what_is_left(tmp_path, scored):
    whole = weights(train(config(tmp_path, "a", precompute_reference=True)))
    for path in (tmp_path / "a" / "reference").glob("*.pt"):
        path.unlink()
    scored.clear()
    resumed = train(config(tmp_path, "a", precompute_reference=True), from_checkpoint="step-000002")
    assert len(scored) == 2
    for name, value in whole.items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_dropped_reference_is_not_replaced_by_the_policy(tiny_denoiser, tmp_path):
    learner = TorchLearner(
        tiny_denoiser(),
        None,
        config(tmp_path, "a").learner,
        Needs(reference=True),
        total_steps=1,
        seed=0,
        dump_folder=tmp_path,
    )
    learner.drop_reference()
    with pytest.raises(RuntimeError, match="holds no reference"):
        learner.score(None, None, reference=True)
