"""Another network in the place of the reference: a denoiser in the same states, or a causal model on the tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dllm_rl.config.load import validate
from dllm_rl.conformance import cases
from dllm_rl.diffusion import likelihood, masking
from dllm_rl.learner.model_scorer import ModelScorer
from dllm_rl.models.loading import save_denoiser
from dllm_rl.models.lora import add_lora
from dllm_rl.models.teacher import load_teacher
from dllm_rl.models.tokenizers import character_tokenizer
from dllm_rl.seeding import generator_for

TOKENIZER = cases.tokenizer()


def config(path, **teacher):
    return validate(
        {
            "run": {"name": "run", "steps": 1},
            "model": {"path": "unread", "dtype": "float64", "teacher": {"path": str(path), **teacher}},
            "data": {"task": {"name": "sudoku4"}},
            "algorithm": {"name": "trace_rl"},
        }
    )


def causal(folder, *, seed=0, vocab_size=16, tokenizer=TOKENIZER):
    """A random Llama of transformers and its tokenizer, saved."""
    torch.manual_seed(seed)
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, initializer_range=0.5, **options)).double().eval()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return made


def scorer(model, teacher):
    made = ModelScorer(model, TOKENIZER, 40, reference=None, seed=0)  # a row or two a micro-batch
    made.hold(teacher)
    return made


@pytest.mark.parametrize("lora", [False, True])
def test_a_denoiser_scores_the_same_states(tmp_path, lora):
    other, batch = cases.denoiser("tiny", seed=1), cases.batch(block_causal=False)
    save_denoiser(other, TOKENIZER, tmp_path)
    model = cases.denoiser("tiny")
    model.module.double()
    if lora:
        add_lora(model, rank=2, alpha=4, seed=0)
    teacher = load_teacher(config(tmp_path), model, TOKENIZER)
    masks = masking.along_trajectory(batch.unmask_step, batch.generated)
    found = scorer(model, teacher).reference(batch, masks, draws=True)
    other.module.double()
    want = likelihood.estimate(other, batch, masks, draws=True)
    torch.testing.assert_close(found.token_logp, want.token_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.draw_token_logp, want.draw_token_logp, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


@pytest.mark.parametrize("estimator", ["trajectory", "elbo"])
def test_a_causal_model_scores_tokens_from_left_to_right(tmp_path, estimator):
    """By hand: log-softmax of transformers' own logits, without the mask token, times the token's weights."""
    batch, model = cases.batch(block_causal=False), cases.denoiser("tiny")
    made = causal(tmp_path)
    teacher = load_teacher(config(tmp_path, autoregressive=True), model, TOKENIZER)
    masks = masking.along_trajectory(batch.unmask_step, batch.generated)
    if estimator == "elbo":
        masks = masking.uniform_count(batch.completion, draws=3, generator=generator_for(0))
    found = scorer(model, teacher).reference(batch, masks, draws=False).token_logp
    for row in range(len(batch)):
        length = int(batch.valid[row].sum())
        with torch.no_grad():
            logits = made(batch.tokens[row, :length][None]).logits[0]
        logits[:, model.mask_id] = -torch.inf
        each = logits.log_softmax(-1)[:-1].gather(-1, batch.tokens[row, 1:length, None])[:, 0]
        want = masks.weight[:, row, 1:length].sum(0) * torch.where(batch.completion[row, 1:length], each, 0.0)
        torch.testing.assert_close(found[row, 1:length], want, rtol=1e-5, atol=1e-6)


def test_rows_that_look_alike_behind_the_mask_are_not_one_to_a_causal_model(tmp_path):
    """The first state of a trajectory is the same for all samples of a prompt; what was said is not."""
    batch, model = cases.batch(block_causal=False), cases.denoiser("tiny")
    two = batch.select(torch.tensor([0, 0]))
    tokens = two.tokens.clone()
    tokens[1, two.completion[1]] = tokens[0, two.completion[0]].flip(0)
    two = type(two)(**{name: getattr(two, name) for name in two.__dataclass_fields__} | {"tokens": tokens})
    causal(tmp_path)
    teacher = load_teacher(config(tmp_path, autoregressive=True), model, TOKENIZER)
    found = scorer(model, teacher).reference(two, masking.fully_masked(two.completion), draws=False).token_logp
    for row in range(2):
        one = two.select(torch.tensor([row]))
        alone = scorer(model, teacher).reference(one, masking.fully_masked(one.completion), draws=False).token_logp
        torch.testing.assert_close(found[row : row + 1], alone)


def test_what_cannot_teach_is_refused(tmp_path):
    model = cases.denoiser("tiny")
    save_denoiser(cases.denoiser("sdar"), TOKENIZER, tmp_path / "blocks")
    with pytest.raises(ValueError, match=r"its block_size is 4, the model's None; both score the same states"):
        load_teacher(config(tmp_path / "blocks"), model, TOKENIZER)
    save_denoiser(model, TOKENIZER, tmp_path / "same")
    letters = character_tokenizer("abcdefghij")
    with pytest.raises(ValueError, match=r"20 tokens are others than the model's \('0', say\)"):
        load_teacher(config(tmp_path / "same"), model, letters, weights=False)
    causal(tmp_path / "few", vocab_size=12)
    with pytest.raises(ValueError, match="it has 12 logits, too few for the model's tokens"):
        load_teacher(config(tmp_path / "few", autoregressive=True), model, TOKENIZER)
    causal(tmp_path / "letters", tokenizer=letters)
    with pytest.raises(ValueError, match=r"10 tokens are others than the model's \('a', say\)"):
        load_teacher(config(tmp_path / "letters", autoregressive=True), model, TOKENIZER)
    with pytest.raises(ValueError, match=r"model.teacher.path = .*: transformers has no causal language model"):
        load_teacher(config(tmp_path / "same", autoregressive=True), model, TOKENIZER)
    with pytest.raises(ValueError, match=r"model\.teacher \(.*\): model '.*nowhere': no such folder"):
        load_teacher(config(tmp_path / "nowhere"), model, TOKENIZER, weights=False)
    with pytest.raises(
        ValueError, match=r"a causal language model needs autoregressive: true\): .* unknown model family"
    ):
        load_teacher(config(tmp_path / "few"), model, TOKENIZER, weights=False)
