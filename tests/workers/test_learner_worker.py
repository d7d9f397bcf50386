"""What a learner's worker leaves behind after a call."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.cluster.group import WorkerRank
from dllm_rl.config.cluster import LearnerSection
from dllm_rl.conformance import cases
from dllm_rl.conformance.algorithms import Subject
from dllm_rl.learner.torch_learner import TorchLearner
from dllm_rl.models.create import create_denoiser
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.types import TrainingBatch
from dllm_rl.workers.learner_worker import LearnerWorker

TOKENIZER = character_tokenizer("0123456789 ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [64, 1 << 14], ids=["several micro-batches", "one"])
def test_no_gradient_is_held_after_an_update(dtype, budget, tmp_path):
    subject, size = Subject("coupled_grpo", {}), {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    denoiser = create_denoiser("tiny", TOKENIZER, **size, max_length=32, seed=0, dtype=dtype)
    settings = LearnerSection(lr=1e-2, tokens_per_microbatch=budget)
    options = {"total_steps": 2, "seed": 0, "dump_folder": tmp_path}
    learner = TorchLearner(denoiser, TOKENIZER, settings, subject.algorithm.needs, **options)
    worker, before = LearnerWorker(learner, WorkerRank(), denoiser), learner.version().digest
    batch, rewards = cases.batch(block_causal=False), subject.scored()
    masks, advantage = subject.masks(batch), subject.algorithm.advantages(rewards, batch)
    reference = [worker.score(batch, masks, reference=True)]
    metrics = worker.update(TrainingBatch(batch, rewards, advantage, [masks], reference), subject.algorithm)
    assert metrics["grad_norm"] > 0 and learner.version().digest != before
    assert not learner._optimizer._masters.gradients(), "they would be there while engines decode"
    assert all(parameter.grad is None for parameter in denoiser.module.parameters())
