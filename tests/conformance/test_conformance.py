"""Every registered plugin keeps its contract; a plugin with one fault is caught by the check that is meant for it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from algorithms.coupled_grpo import CoupledGRPO
from algorithms.masked_sft import MaskedSFT
from algorithms.trace_rl import TraceRL
from algorithms.wd1 import WD1
from dllm_rl import registry
from dllm_rl.cli.main import main
from dllm_rl.conformance.rewards import reads_files
from dllm_rl.conformance.suite import CHECKS, SUBJECTS, check_plugin, hold
from dllm_rl.conformance.violation import NotCheckable, Violation
from dllm_rl.protocols.algorithm import Needs
from dllm_rl.protocols.strategy import UnmaskingStrategy
from dllm_rl.seeding import generator_for
from dllm_rl.tasks.sudoku import Sudoku4
from dllm_rl.types import Loss, MaskSample

ROWS = {
    "gsm8k": [{"question": f"What is {i} + 1?", "answer": f"Add them.\n#### {i + 1}"} for i in range(6)],
    "math": [
        {"problem": f"What is ${i}+1$?", "solution": f"So $\\boxed{{{i + 1}}}$.", "answer": f"{i + 1}"}
        for i in range(6)
    ],
    "jsonl": [{"prompt": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in range(6)],
}


def files(task: str, folder: Path) -> dict[str, Any]:
    """Options of a task that reads files: four rows for training, two held out."""
    for name, rows in (("train", ROWS[task][:4]), ("test", ROWS[task][4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train_file": str(folder / "train.jsonl"), "test_file": str(folder / "test.jsonl")}
    return options | ({"success": "math_answer"} if task == "jsonl" else {})


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in CHECKS for name in registry.names(kind)], ids=lambda value: value
)
def test_registered_plugins_keep_their_contract(kind, name, tmp_path, request):
    if name == "object_store":
        request.getfixturevalue("ray_cluster")
    if name == "cuda_ipc" and not torch.cuda.is_available():
        with pytest.raises(NotCheckable, match="transports/cuda_ipc: it needs a GPU"):
            list(check_plugin(kind, name, {}))
        return
    options = files(name, tmp_path) if kind == "tasks" and reads_files(name) else {}
    problems = {f.check: f.problem for f in check_plugin(kind, name, options) if f.problem is not None}
    assert problems == {}


class Peeks(CoupledGRPO):
    def masks(self, batch, generator, update=0):
        sample = super().masks(batch, generator)
        return MaskSample(
            mask=sample.mask & torch.rand(sample.mask.shape, generator=generator).lt(0.9), weight=sample.weight
        )


class CountsTwice(CoupledGRPO):
    def masks(self, batch, generator, update=0):
        sample = super().masks(batch, generator)
        return MaskSample(mask=sample.mask, weight=sample.weight * 2)


class CountsTwiceLater(CoupledGRPO):
    needs = Needs(reference=True, fresh_masks=True)

    def masks(self, batch, generator, update=0):
        sample = super().masks(batch, generator)
        return MaskSample(mask=sample.mask, weight=sample.weight * (2 if update else 1))


class PeeksLater(CoupledGRPO):
    needs = Needs(reference=True, fresh_masks=True)

    def joint_masks(self, batch, generator, updates):
        first, *later = (self.masks(batch, generator) for _ in range(updates))
        return [first, *(MaskSample(mask=torch.zeros_like(one.mask), weight=one.weight) for one in later)]


class ShowsTheAnswer(TraceRL):
    def reference_masks(self, batch, masks, generator):
        return MaskSample(mask=torch.zeros_like(masks.mask), weight=masks.weight)


class SharesMasksByGlobalSeed(CoupledGRPO):
    def masks(self, batch, generator, update=0):
        return super().masks(batch, generator_for(time.perf_counter_ns()))


class ScoresThePrompt(TraceRL):
    def masks(self, batch, generator, update=0):
        sample = super().masks(batch, generator)
        first = torch.zeros_like(batch.valid)
        first[:, 1] = True
        return MaskSample(mask=sample.mask | first, weight=sample.weight + first)


class ShowsTheTail(CoupledGRPO):
    def masks(self, batch, generator, update=0):
        sample = super().masks(batch, generator)
        return MaskSample(mask=sample.mask & ~batch.tail, weight=sample.weight)


class HidesItsReplay(TraceRL):
    @property
    def needs(self):
        return Needs()


class CountsFailuresAsZero(TraceRL):
    def advantages(self, rewards, batch):
        return super().advantages(dataclasses.replace(rewards, included=torch.ones_like(rewards.included)), batch)


class LooksAtTheFirstRow(TraceRL):
    def advantages(self, rewards, batch):
        return super().advantages(rewards, batch) + rewards.total[0]


class NeverSatisfied(TraceRL):
    def advantages(self, rewards, batch):
        return (rewards.total - 0.5) * rewards.included


class InDouble(TraceRL):
    def advantages(self, rewards, batch):
        return super().advantages(rewards, batch).double()


class LocalMean(MaskedSFT):
    def loss(self, new, experience):
        return Loss(-new.token_logp[experience.batch.completion].mean())


class TrainsOnPadding(MaskedSFT):
    def loss(self, new, experience):
        return Loss(-new.token_logp.sum() / experience.counts.num_tokens)


class Backwards(TraceRL):
    def loss(self, new, experience):
        return Loss(-super().loss(new, experience).value)


class NoReference(TraceRL):
    @property
    def needs(self):
        return dataclasses.replace(super().needs, reference=True)


class BelievesTheEngine(TraceRL):
    def loss(self, new, experience):
        behaviour = dataclasses.replace(experience.old, token_logp=experience.batch.behaviour_logp.double())
        return super().loss(new, dataclasses.replace(experience, old=behaviour))


class ScoresForNothing(WD1):
    @property
    def needs(self):
        return dataclasses.replace(super().needs, old=True)


class ChangesTheBatch(TraceRL):
    def masks(self, batch, generator, update=0):
        batch.tokens.add_(1)
        return super().masks(batch, generator)


class Sum(UnmaskingStrategy):
    """Row 3 is chosen by what row 0 holds."""

    def select(self, candidates):
        best = candidates.noise + candidates.noise[:1]
        best = best.masked_fill(~candidates.eligible, -1)
        return candidates.eligible & (best == best.amax(-1, keepdim=True))


class Certain(UnmaskingStrategy):
    def select(self, candidates):
        return candidates.eligible & (candidates.logp > -1.5)


class Everything(UnmaskingStrategy):
    def select(self, candidates):
        return torch.ones_like(candidates.eligible)


class ByToken(UnmaskingStrategy):
    def select(self, candidates):
        even = candidates.token.sum(-1, keepdim=True) % 2 == 0
        first = candidates.eligible & (candidates.eligible.cumsum(-1) == 1)
        return torch.where(even, candidates.eligible, first)


class Dice(UnmaskingStrategy):
    def select(self, candidates):
        noise = torch.rand(candidates.eligible.shape, generator=generator_for(time.perf_counter_ns()))
        noise = noise.masked_fill(~candidates.eligible, -1)
        return candidates.eligible & (noise == noise.amax(-1, keepdim=True))


def hangs(prompts, completions, **columns):
    if any("boxed" in text for text in completions):
        time.sleep(60)
    return [0.0] * len(completions)


def raises(prompts, completions, **columns):
    return [float(text) if text else 0.0 for text in completions]


def short(prompts, completions, **columns):
    return [0.0] * (len(completions) - 1)


def infinite(prompts, completions, **columns):
    return [float("inf") if text.startswith("9") else 0.0 for text in completions]


def moody(prompts, completions, **columns):
    return [float(time.perf_counter_ns() % 1000) for _ in completions]


class Doubled(Sudoku4):
    def examples(self, split):
        rows = list(super().examples(split))
        return [*rows, rows[0]]


class Leaking(Sudoku4):
    def examples(self, split):
        return super().examples("train")


class Drifting(Sudoku4):
    def examples(self, split):
        rows = list(super().examples(split))
        return [dataclasses.replace(rows[0], answer=str(time.perf_counter_ns())), *rows[1:]]


class WrongGold(Sudoku4):
    def self_test(self, example):
        return "1" * 16, "2" * 16


class TooKind(Sudoku4):
    def self_test(self, example):
        return example.answer, example.answer


class Mute(Sudoku4):
    def examples(self, split):
        return [dataclasses.replace(example, prompt="") for example in super().examples(split)]


class OwnLetters(Sudoku4):
    def examples(self, split):
        mark = "?" if split == "test" else "="
        return [dataclasses.replace(e, prompt=e.prompt[:-1] + mark) for e in super().examples(split)]


class RowsOnly(CoupledGRPO):
    def loss(self, new, experience):
        assert experience.advantage.dim() == 1
        return super().loss(new, experience)


FAULTS: list[tuple[str, str, str]] = [
    ("algorithms", "Peeks", "no_token_is_scored_in_sight"),
    ("algorithms", "CountsTwice", "weights_are_a_partition_of_unity"),
    ("algorithms", "PeeksLater", "no_token_is_scored_in_sight"),
    ("algorithms", "CountsTwiceLater", "weights_are_a_partition_of_unity"),
    ("algorithms", "ShowsTheAnswer", "the_reference_scores_the_same_tokens"),
    ("algorithms", "SharesMasksByGlobalSeed", "masks_are_drawn_from_the_generator_alone"),
    ("algorithms", "ScoresThePrompt", "only_the_completion_is_scored"),
    ("algorithms", "ShowsTheTail", "what_follows_the_end_is_not_shown"),
    ("algorithms", "HidesItsReplay", "trajectories_are_read_as_declared"),
    ("algorithms", "CountsFailuresAsZero", "excluded_rows_count_for_nothing"),
    ("algorithms", "LooksAtTheFirstRow", "row_order_does_not_matter"),
    ("algorithms", "NeverSatisfied", "equal_rewards_teach_nothing"),
    ("algorithms", "InDouble", "advantages_have_the_shape_of_rows_or_tokens"),
    ("algorithms", "LocalMean", "loss_does_not_depend_on_sharding"),
    ("algorithms", "TrainsOnPadding", "loss_reads_only_completions"),
    ("algorithms", "RowsOnly", "credit_per_token_is_taken_as_declared"),
    ("algorithms", "Backwards", "better_rows_become_likelier"),
    ("algorithms", "BelievesTheEngine", "behaviour_is_read_as_declared"),
    ("algorithms", "ScoresForNothing", "old_policy_is_read_as_declared"),
    ("algorithms", "NoReference", "reference_is_needed_as_declared"),
    ("algorithms", "ChangesTheBatch", "the_batch_is_left_as_it_was"),
    ("strategies", "Sum", "rows_do_not_see_each_other"),
    ("strategies", "Certain", "every_row_moves_on"),
    ("strategies", "Everything", "only_hidden_positions_are_chosen"),
    ("strategies", "ByToken", "what_is_in_sight_does_not_matter"),
    ("strategies", "Dice", "equal_candidates_give_equal_choices"),
    ("engines", "ByPosition", "a_trajectory_does_not_depend_on_its_batch"),
    ("engines", "OneSeed", "seeds_decide"),
    ("engines", "Approximate", "log_probabilities_are_the_learners"),
    ("engines", "TellsTheModels", "log_probabilities_are_the_learners"),
    ("engines", "MixesRows", "a_trajectory_does_not_depend_on_its_batch"),
    ("engines", "MixesRows", "it_decodes_what_the_oracle_decodes"),
    ("engines", "TurnsRowsRound", "trajectories_are_complete"),
    ("engines", "MiscountsForwards", "trajectories_are_complete"),
    ("engines", "MiscountsForwards", "it_decodes_what_the_oracle_decodes"),
    ("engines", "StartsOver", "pausing_changes_nothing"),
    ("engines", "ClaimsWhatOthersDecoded", "pausing_changes_nothing"),
    ("engines", "KeepsTheBuffer", "weights_arrive_and_act"),
    ("engines", "RepeatsTheSendersDigests", "weights_arrive_and_act"),
    ("engines", "TakesAnyName", "weights_arrive_and_act"),
    ("engines", "WakesEmpty", "it_wakes_as_it_fell_asleep"),
    ("engines", "StandsStill", "its_heart_beats"),
    ("engines", "CutsPrompts", "what_does_not_fit_is_refused"),
    ("rewards", "hangs", "every_text_gets_a_verdict"),
    ("rewards", "raises", "every_text_gets_a_verdict"),
    ("rewards", "short", "every_text_gets_a_verdict"),
    ("rewards", "infinite", "every_text_gets_a_verdict"),
    ("rewards", "moody", "equal_texts_get_equal_rewards"),
    ("tasks", "Doubled", "uids_are_unique"),
    ("tasks", "Leaking", "held_out_examples_are_held_out"),
    ("tasks", "Drifting", "examples_are_always_the_same"),
    ("tasks", "WrongGold", "gold_is_right_and_wrong_is_wrong"),
    ("tasks", "TooKind", "gold_is_right_and_wrong_is_wrong"),
    ("tasks", "Mute", "prompts_are_not_empty"),
    ("tasks", "OwnLetters", "characters_cover_the_texts"),
    ("transports", "KeepsTheFirst", "what_is_sent_arrives"),
    ("caches", "Rounds", "committed_entries_come_back"),
    ("caches", "KeepsTheFirstRows", "committed_entries_come_back"),
    ("caches", "KeepsTheFirstRows", "decoding_with_it_is_exact"),
    ("rollouters", "LosesATurn", "episodes_are_whole"),
    ("rollouters", "Edits", "turns_are_what_was_decoded"),
    ("rollouters", "AsksAgain", "samples_do_not_share_randomness"),
    ("rollouters", "Moody", "it_goes_on_where_it_was"),
]


@pytest.fixture
def here(monkeypatch):
    """Makes this folder importable, also by reward workers; gives this file's name for "package.module:Name"."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delitem(sys.modules, "test_conformance", raising=False)
    return "test_conformance"


@pytest.mark.parametrize(("kind", "name", "check"), FAULTS, ids=lambda value: value)
def test_a_fault_is_caught_by_the_check_that_is_meant_for_it(kind, name, check, here, monkeypatch):
    if kind == "rewards":
        monkeypatch.setattr("dllm_rl.conformance.rewards.TIMEOUT_S", 0.5)
    options = {"train_puzzles": 40, "test_puzzles": 20} if kind == "tasks" else {}
    parts = dict.fromkeys(("rollouters", "transports", "caches"), "broken_parts")
    module = {"engines": "broken_engines", **parts}.get(kind, here)
    subject = SUBJECTS[kind](f"{module}:{name}", options)
    with contextlib.closing(subject) if kind == "rewards" else contextlib.nullcontext(), pytest.raises(Violation):
        hold(next(c for c in CHECKS[kind] if c.__name__ == check), subject)


def test_every_check_has_caught_something():
    caught = {(kind, check) for kind, _, check in FAULTS}
    # Two say that a plugin works at all: it has the attributes, and the learner runs.
    works_at_all = {("algorithms", "declares_itself"), ("algorithms", "the_learner_can_train_with_it")}
    # Of families, see test_families.py.
    assert {(k, check.__name__) for k in CHECKS if k != "families" for check in CHECKS[k]} == caught | works_at_all


def test_command_line(here, capsys, tmp_path):
    assert main(["check-plugin", "strategy", "entropy", "--json", str(tmp_path / "out.json")]) == 0
    assert "5 checks hold, 0 fail" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["failed"] == 0 and len(written["findings"]) == 5
    assert main(["check-plugin", "strategies", f"{here}:Certain", "--quiet"]) == 2
    out = capsys.readouterr().out
    assert "FAIL strategies/test_conformance:Certain: every row moves on" in out and "would decode forever" in out
    assert main(["check-plugin", "strategies", "entropi"]) == 2
    assert "nearest is 'entropy'" in capsys.readouterr().err
    assert main(["check-plugin", "colours", "red"]) == 2
    assert "unknown kind 'colours'" in capsys.readouterr().err
    assert main(["check-plugin", "strategies", "confidence_threshold", "threshold=7"]) == 2
    assert "must be in" in capsys.readouterr().err
