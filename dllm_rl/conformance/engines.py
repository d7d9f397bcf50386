"""What every rollout engine must keep to; see dllm_rl.protocols.engine."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import ItemsView, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl.config.plugins import build, engine_class
from dllm_rl.conformance import cases
from dllm_rl.conformance.violation import Violation, require
from dllm_rl.data.collate import collate
from dllm_rl.diffusion import likelihood, masking
from dllm_rl.driver.check_answer import AnswerCheck, Asked
from dllm_rl.errors import UnknownWeight
from dllm_rl.models.denoiser import TransformersDenoiser
from dllm_rl.models.digest import tensor_digests
from dllm_rl.models.loading import load_denoiser, save_denoiser
from dllm_rl.protocols.engine import TRAIN, Capabilities, EngineSetup, RolloutEngine, SharedModel, TensorSpec
from dllm_rl.types import GIVEN, Prompt, Sampling, Trajectory, WeightsVersion

FAMILIES = ("tiny", "dream", "sdar")  # full attention, shifted predictions, block-causal with a cache
WEIGHTS = WeightsVersion(step=7, digest="conformance")
NEWER = WeightsVersion(step=8, digest="newer")
SAMPLED = Sampling(max_new_tokens=8, temperature=1.0, tokens_per_step=2, block_size=cases.BLOCK)
TEMPERED = dataclasses.replace(SAMPLED, temperature=0.6, top_k=6, top_p=0.95)
GREEDY = Sampling(max_new_tokens=8, temperature=0.0, tokens_per_step=2, block_size=cases.BLOCK)
LOGP_TOLERANCE = 1e-4  # float32


def oracle(denoiser: TransformersDenoiser, strategy: str = "low_confidence") -> RolloutEngine:
    """The reference engine, over the very network."""
    kind, options = engine_class("reference", {})
    shared = SharedModel(
        denoiser=denoiser, tokenizer=cases.tokenizer(), strategies={TRAIN: build("strategies", strategy, {})}
    )
    setup = EngineSetup(
        rank=0, path="", strategies={}, trains=frozenset({"model"}), load=lambda: (denoiser, None), shared=shared
    )
    made: RolloutEngine = kind(options, setup)
    made.weights = WEIGHTS
    return made


class Subject:
    """An engine class and the prompts it decodes."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.engine, self.options = engine_class(name, options)
        self.capabilities: Capabilities = self.engine.capabilities(self.options)
        self.folder = tempfile.TemporaryDirectory()
        self.models: dict[str, TransformersDenoiser] = {}
        for family in FAMILIES:
            denoiser, tokenizer = cases.denoiser(family), cases.tokenizer()
            attention = "full" if denoiser.block_size is None else "block_causal"
            served = self.capabilities.families is None or family in self.capabilities.families
            if not served or attention not in self.capabilities.attention:
                continue
            self.models[family] = denoiser
            # A random model hardly ever says EOS: call two digits that it likes so, and rows end early.
            said = torch.cat([t.tokens[t.prompt_length :] for t in oracle(denoiser).generate(PROMPTS, SAMPLED, seed=0)])
            denoiser.end_ids = tuple((said.bincount() / len(said) - 0.08).abs().argsort()[:2].tolist())
            denoiser.eos_id = denoiser.end_ids[0]
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(denoiser.eos_id)
            denoiser.config["eos_token_id"] = list(denoiser.end_ids)
            save_denoiser(denoiser, tokenizer, self._path(denoiser))

    def cases(self) -> ItemsView[str, TransformersDenoiser]:
        """The models that the engine serves, by family."""
        return self.models.items()

    def close(self) -> None:
        """Remove the models."""
        self.folder.cleanup()

    def make(
        self, denoiser: TransformersDenoiser, strategy: str = "low_confidence", weights: WeightsVersion = WEIGHTS
    ) -> RolloutEngine:
        """The engine under test, in a process that no learner shares."""
        setup = EngineSetup(
            rank=0,
            path=str(self._path(denoiser)),
            strategies={TRAIN: {"name": strategy}},
            trains=frozenset({"model"}),
            load=lambda: load_denoiser(self._path(denoiser)),
        )
        made: RolloutEngine = self.engine(self.options, setup)
        made.weights = weights
        return made

    def _path(self, denoiser: TransformersDenoiser) -> Path:
        return Path(self.folder.name) / denoiser.family.name


def _prompt(number: int, length: int) -> Prompt:
    ids = tuple(3 + (5 * number + 3 * i) % 10 for i in range(length))
    injected = {1: 4, 6: 5} if number % 2 else {}
    return Prompt(uid=f"p{number}", token_ids=ids, text="", answer="", task="conformance", injected=injected)


PROMPTS = tuple(_prompt(number, length) for number, length in enumerate((3, 6, 1, 5, 8, 2)))


def _difference(a: Trajectory, b: Trajectory) -> str | None:
    for name in ("prompt_uid", "sample", "prompt_length", "completion_length", "num_forwards", "finish"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} {getattr(a, name)!r} against {getattr(b, name)!r}"
    for name in ("tokens", "unmask_step", "events"):
        x, y = getattr(a, name), getattr(b, name)
        if not torch.equal(x, y):
            return f"{name} {x.tolist()} against {y.tolist()}"
    if not torch.allclose(a.behaviour_logp, b.behaviour_logp, atol=LOGP_TOLERANCE):
        return f"behaviour_logp {a.behaviour_logp.tolist()} against {b.behaviour_logp.tolist()}"
    return None


def _same(got: Sequence[Trajectory], want: Sequence[Trajectory], what: str) -> None:
    require(len(got) == len(want), f"{what}: {len(got)} trajectories, expected {len(want)}")
    for a, b in zip(got, want, strict=True):
        difference = _difference(a, b)
        require(difference is None, f"{what}, prompt {b.prompt_uid}, sample {b.sample}: {difference}")


def it_decodes_what_the_oracle_decodes(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """Greedy and sampled, with every way of choosing positions, trajectories are those of the reference engine."""
    if not subject.capabilities.exact:
        return
    for strategy in ("low_confidence", "random", "confidence_threshold"):
        for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
            got = subject.make(denoiser, strategy).generate(PROMPTS, sampling, seed=3, samples_per_prompt=2)
            want = oracle(denoiser, strategy).generate(PROMPTS, sampling, seed=3, samples_per_prompt=2)
            _same(got, want, f"{family}, {strategy}, {name}")


def a_trajectory_does_not_depend_on_its_batch(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """It is a function of weights, prompt, sample index, sampling and seed only; order is prompt-major."""
    engine = subject.make(denoiser)
    together = engine.generate(PROMPTS, SAMPLED, seed=5, samples_per_prompt=2)
    order = [(t.prompt_uid, t.sample) for t in together]
    require(order == [(p.uid, s) for p in PROMPTS for s in range(2)], f"{family}: order {order}")
    known = dict(zip(order, together, strict=True))
    alone = [t for p in PROMPTS for t in engine.generate([p], SAMPLED, seed=5, samples_per_prompt=2)]
    _same(alone, together, f"{family}, one prompt at a time")
    turned = engine.generate(PROMPTS[::-1], SAMPLED, seed=5)
    _same(turned, [known[p.uid, 0] for p in PROMPTS[::-1]], f"{family}, prompts in reverse order")


def seeds_decide(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """One seed gives the same samples again, another seed others."""
    engine = subject.make(denoiser)
    first = engine.generate(PROMPTS, SAMPLED, seed=1)
    _same(engine.generate(PROMPTS, SAMPLED, seed=1), first, f"{family}, the same seed")
    other = engine.generate(PROMPTS, SAMPLED, seed=2)
    moved = any(not torch.equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))
    require(moved, f"{family}: seeds 1 and 2 give the same tokens")
    pairs = engine.generate(PROMPTS, SAMPLED, seed=1, samples_per_prompt=2)
    differ = any(not torch.equal(a.tokens, b.tokens) for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    require(differ, f"{family}: two samples of a prompt are the same")  # of one prompt they may be


def trajectories_are_complete(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """Answers fit their requests, as every run checks: rows in order, given tokens kept, every generated position
    committed once, no mask token left, lengths, finish and weights told as they are.
    """
    check = AnswerCheck(denoiser, subject.capabilities, {TRAIN: "low_confidence"})
    for sampling in (GREEDY, SAMPLED, TEMPERED):
        asked = Asked(prompts=PROMPTS, sampling=sampling, samples_per_prompt=2, weights=WEIGHTS)
        problem = check(asked, subject.make(denoiser).generate(PROMPTS, sampling, seed=0, samples_per_prompt=2))
        require(not problem, f"{family}: {problem}")


def log_probabilities_are_the_learners(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """Where exact is True, its log-probabilities are what the learner's estimator gives along the trajectory."""
    tells = subject.capabilities.sampled_logp
    for sampling in (SAMPLED, TEMPERED):
        rows = [t for t in subject.make(denoiser).generate(PROMPTS, sampling, seed=4) if t.exact]
        if not rows:
            return
        batch = collate(rows, denoiser, group=list(range(len(rows))))
        masks = masking.along_trajectory(batch.unmask_step, batch.generated, block_ids=batch.block_ids)
        found: dict[str, tuple[Tensor, Sampling | None]] = {"behaviour_logp": (batch.behaviour_logp, None)}
        if tells and not sampling.plain:
            if batch.sampled_logp is None:
                raise Violation(f"{family}: no sampled_logp, which the capabilities promise")
            found["sampled_logp"] = (batch.sampled_logp, sampling)
        for name, (given, of) in found.items():
            replayed = likelihood.estimate(denoiser, batch, masks, sampling=of).token_logp
            off = float((replayed - torch.where(batch.generated, given, 0.0)).abs().max())
            require(off <= LOGP_TOLERANCE, f"{family}: {name} is off by up to {off:.2g} nats")


def pausing_changes_nothing(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """Rows that pause and go on end as those that never did, and tell which weights decoded what."""
    if not subject.capabilities.partial:
        return
    for strategy in ("low_confidence", "random", "confidence_threshold"):
        where = f"{family}, {strategy}"
        engine = subject.make(denoiser, strategy)
        whole = engine.generate(PROMPTS, SAMPLED, seed=6, samples_per_prompt=2)
        partial = engine.generate(PROMPTS, SAMPLED, seed=6, samples_per_prompt=2, max_blocks=1)
        require(any(t.finish == "paused" for t in partial), f"{where}: no row pauses after 1 block")
        ended = subject.make(denoiser, strategy, NEWER).generate(
            PROMPTS, SAMPLED, seed=6, samples_per_prompt=2, partial=partial
        )
        _same(ended, whole, f"{where}, paused after 1 block")
        for first, t in zip(partial, ended, strict=True):
            want = torch.where(t.unmask_step < first.num_forwards, WEIGHTS.step, NEWER.step)
            if first.finish != "paused":
                want = torch.full_like(want, WEIGHTS.step)
            want[(t.unmask_step == GIVEN) | (t.unmask_step == t.num_forwards)] = GIVEN
            require(
                torch.equal(t.weights_step, want),
                f"{where}, prompt {t.prompt_uid}: weights_step {t.weights_step.tolist()}, not {want.tolist()}",
            )
            kept = first.unmask_step < first.num_forwards
            require(
                torch.equal(first.tokens[kept], t.tokens[kept])
                and torch.equal(first.behaviour_logp[kept], t.behaviour_logp[kept]),
                f"{where}, prompt {t.prompt_uid}: what was decoded before the pause has changed",
            )


def weights_arrive_and_act(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """A push changes what is decoded, where exact is True to what the reference engine decodes with those weights;
    digests are of what is held.
    """
    engine, other = subject.make(denoiser), cases.denoiser(family, seed=1)
    named = [(name, value.detach()) for name, value in other.module.named_parameters()]
    specs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in named]
    before = engine.generate(PROMPTS, GREEDY, seed=0)
    engine.begin_weights(specs)
    for name, value in named:
        buffer = value.clone()
        engine.write_weights({name: buffer})
        buffer.zero_()  # a buffer is used again: what the engine keeps must be a copy
    require(engine.commit_weights() == tensor_digests(named), f"{family}: digests are not those of what was written")
    other.eos_id, other.end_ids = denoiser.eos_id, denoiser.end_ids
    after = engine.generate(PROMPTS, GREEDY, seed=0)
    moved = any(not torch.equal(a.tokens, b.tokens) for a, b in zip(before, after, strict=True))
    require(moved, f"{family}: other weights decode the same tokens")
    if subject.capabilities.exact:
        _same(after, oracle(other).generate(PROMPTS, GREEDY, seed=0), f"{family}, after a push")
    try:
        engine.begin_weights([TensorSpec("no.such.weight", (1,), torch.float32)])
    except UnknownWeight as error:
        require("no.such.weight" in str(error), f"{family}: the message does not name the tensor: {error}")
    else:
        require(False, f"{family}: a tensor that the model does not have was announced, and not refused")


def it_wakes_as_it_fell_asleep(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """After sleep() and wake() it decodes as before."""
    if not subject.capabilities.sleep:
        return
    engine = subject.make(denoiser)
    before = engine.generate(PROMPTS, GREEDY, seed=0)
    engine.sleep()
    engine.wake()
    _same(engine.generate(PROMPTS, GREEDY, seed=0), before, f"{family}, after sleep")


def its_heart_beats(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """heartbeat() grows with every call that decodes."""
    engine = subject.make(denoiser)
    before = engine.heartbeat()
    engine.generate(PROMPTS[:1], GREEDY, seed=0)
    require(engine.heartbeat() > before, f"{family}: heartbeat() is {before} before and after decoding")


def what_does_not_fit_is_refused(subject: Subject, family: str, denoiser: TransformersDenoiser) -> None:
    """A prompt that leaves no room for the canvas is a ValueError that names it."""
    long = Prompt(uid="long", token_ids=(3,) * denoiser.max_length, text="", answer="", task="conformance")
    try:
        subject.make(denoiser).generate([long], GREEDY, seed=0)
    except ValueError as error:
        require("long" in str(error), f"{family}: the message does not name the prompt: {error}")
    else:
        require(False, f"{family}: a prompt of {denoiser.max_length} tokens was decoded")
