"""Users' own rows, in TRL's data set formats: prompt-only, prompt-completion, preference; text or conversations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from dllm_rl import seeding
from dllm_rl.errors import UserError, nearest
from dllm_rl.protocols.task import Task
from dllm_rl.tasks.files import Row, hub_rows, read_rows
from dllm_rl.tasks.messages import completion_of, prompt_of, shared_prompt, split_messages, with_shots
from dllm_rl.types import Example

_RESERVED = ("prompts", "completions", "completion_tokens")  # what reward functions receive besides columns
Split = Literal["train", "test"]


class Rows(Task):
    """Rows of files, of a folder of ``datasets.save_to_disk``, or of the hub.

    A row has ``prompt``, and for supervised training ``completion``, or for preferences ``chosen`` and ``rejected``;
    all of them text, or all of them message lists (a completion is then one assistant message). ``messages`` may take
    the place of prompt and completion: its last message, the assistant's, is the completion. Preferences may lack a
    prompt: it is what both begin with. The kind of the first row is the kind of every row. Further columns reach reward
    functions under their own names.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        train_file: str = ""  # .jsonl, .json, .csv, .parquet, a glob of them, or a folder of datasets.save_to_disk
        test_file: str | None = None  # null = no held-out evaluation, unless test_fraction or test_split say otherwise
        hub: str = ""  # data set of the hub, "owner/name", instead of train_file
        hub_config: str = "default"  # which of its configurations
        train_split: str = "train"  # of the hub's data set, or of a saved folder that holds several
        test_split: str = ""  # held out; "" = none
        test_fraction: float = 0.0  # share of the prompts of train_file that is held out instead of trained on
        split_seed: int = 0  # which ones; not the run's seed, so that runs and later stages hold out the same rows
        prompt: str = "prompt"  # name of the prompt column; likewise the following
        completion: str = "completion"
        chosen: str = "chosen"
        rejected: str = "rejected"
        messages: str = "messages"
        answer: str = "answer"  # name of the column that verifiers compare with; it may be missing
        trace: str = ""  # name of the column with the reasoning before the answer, for algorithms that give hints
        few_shot: int = 0  # solved examples before every prompt: the first rows of few_shot_file
        few_shot_file: str | None = None  # null = train_file, whose first rows are then not trained on
        success: str = ""  # reward whose value >= 1 counts as solved, and the default reward; "" = the first of rewards
        gold: str = "\\boxed{{answer}}"  # what must score full before training starts; {answer} is filled in
        limit: int | None = None  # only the first rows of each file

        def __post_init__(self) -> None:
            if self.limit is not None and self.limit < 1:
                raise UserError(f"limit = {self.limit}: must be at least 1, or null for every row")
            if bool(self.train_file) == bool(self.hub):
                raise UserError("give exactly one of data.task.train_file (your files) and data.task.hub (a data set)")
            if not 0 <= self.test_fraction < 1:
                raise UserError(f"test_fraction = {self.test_fraction}: must be at least 0 and less than 1")
            held_out = [bool(self.test_file), bool(self.test_split), self.test_fraction > 0]
            if sum(held_out) > 1:
                raise UserError("data.task: test_file, test_split and test_fraction all say what is held out; give one")
            if self.few_shot < 0:
                raise UserError(f"few_shot = {self.few_shot}: must be at least 0")

    characters = ""
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.success = config.success  # type: ignore[misc]  # here the user says it, row by row nothing does
        self.rewards = (config.success,) if config.success else ()  # type: ignore[misc]
        self._made: dict[Split, Sequence[Example]] = {}

    @override
    def examples(self, split: Split) -> Sequence[Example]:
        """The rows in the order of the file; no test file, split or fraction means no test rows."""
        if split not in self._made:
            self._made[split] = self._examples(split)
        return self._made[split]

    @override
    def self_test(self, example: Example) -> tuple[str, str] | None:
        """The reference completion (or the filled-in ``gold``), and nothing at all; None for a row without either."""
        gold = self._reference(example)
        return None if gold is None else (gold, "")

    def _examples(self, split: Split) -> Sequence[Example]:
        c, cut = self.config, self.config.test_fraction > 0
        if split == "test" and not (c.test_file or c.test_split or cut):
            return []
        examples = self._read("train" if cut else split)
        if c.few_shot:
            shots = self._shots()
            own = c.few_shot_file is None and (cut or split == "train")  # nothing is trained on that a prompt shows
            examples = [with_shots(example, shots) for example in examples[c.few_shot if own else 0 :]]
        return self._part(examples, split) if cut else examples

    def _read(self, split: Split) -> Sequence[Example]:
        """All rows of a source, in its order."""
        c = self.config
        test = split == "test"
        part = (c.test_split if test else "") or c.train_split
        if c.hub and not (test and c.test_file):
            return self._of(hub_rows(c.hub, c.hub_config, part)[: c.limit], f"{c.hub}/{part}")
        path = c.test_file if test and c.test_file else c.train_file
        return self._of(read_rows(path, c.limit, part), Path(path).name)

    def _of(self, rows: Sequence[Row], name: str) -> Sequence[Example]:
        examples = [self._example(f"{name}-{i}", row, where) for i, (where, row) in enumerate(rows)]
        kind = self._kind(rows[0][1])
        for where, row in rows:
            if self._kind(row) != kind:
                raise UserError(f"{where}: is {self._kind(row)}, but the first row is {kind}; use one file for each")
        return examples

    def _part(self, examples: Sequence[Example], split: Split) -> Sequence[Example]:
        """The rows of a split by their prompts, so that rows that share a prompt stay together."""
        c = self.config
        keys = {str(e.prompt): seeding.derive(c.split_seed, "held-out", str(e.prompt)) for e in examples}
        held = set(sorted(keys, key=lambda prompt: keys[prompt])[: math.ceil(c.test_fraction * len(keys))])
        if len(held) == len(keys):
            raise UserError(f"test_fraction = {c.test_fraction}: holds out all of {len(keys)} prompts; lower it")
        return [e for e in examples if (str(e.prompt) in held) == (split == "test")]

    def _shots(self) -> Sequence[tuple[Example, str]]:
        c = self.config
        file = c.few_shot_file
        examples = self._read("train") if file is None else self._of(read_rows(file), Path(file).name)
        if len(examples) < c.few_shot + (file is None):
            raise UserError(f"few_shot = {c.few_shot}: there are {len(examples)} rows; give fewer, or few_shot_file")
        shots = [(example, self._reference(example)) for example in examples[: c.few_shot]]
        for example, text in shots:
            if text is None:
                raise UserError(f"example '{example.uid}' has neither completion nor answer; few_shot needs one")
        return [(example, text) for example, text in shots if text is not None]

    def _reference(self, example: Example) -> str | None:
        if example.completion is not None:
            return example.completion
        return self.config.gold.replace("{answer}", example.answer) if example.answer else None

    def _kind(self, row: dict[str, Any]) -> str:
        c = self.config
        text = isinstance(next(row[name] for name in (c.prompt, c.messages, c.chosen) if name in row), str)
        kind = "preference" if c.chosen in row else "prompt-only"
        kind = "prompt-completion" if c.completion in row or (c.messages in row and c.prompt not in row) else kind
        form = "text" if text else "conversation"
        return f"{kind} {form} {'with' if c.answer in row else 'without'} '{c.answer}'"

    def _example(self, uid: str, row: dict[str, Any], where: str) -> Example:
        c = self.config
        if (c.chosen in row) != (c.rejected in row) or (c.chosen in row and c.completion in row):
            raise UserError(
                f"{where}: a row has '{c.completion}', or both '{c.chosen}' and '{c.rejected}', or none of the three"
            )
        given = {"completion": c.completion, "chosen": c.chosen, "rejected": c.rejected}
        values = {field: row[name] for field, name in given.items() if name in row}
        used = {c.prompt, c.answer, c.trace, *given.values()}
        if c.prompt in row:
            prompt = prompt_of(row[c.prompt], f"{where}: column '{c.prompt}'")
        elif c.messages in row and not values:
            used.add(c.messages)
            prompt, values["completion"] = split_messages(row[c.messages], f"{where}: column '{c.messages}'")
        elif "chosen" in values:
            prompt, values = shared_prompt(values, where)
        else:
            hint = nearest(c.prompt, row, list_known=False)
            raise UserError(f"{where}: no column '{c.prompt}'; the row has {', '.join(map(str, row)) or 'none'}{hint}")
        texts = {
            field: completion_of(value, isinstance(prompt, list), f"{where}: column '{given[field]}'")
            for field, value in values.items()
        }
        columns = {name: value for name, value in row.items() if name not in used}
        if c.trace and not (isinstance(row.get(c.trace), str) and row[c.trace]):
            raise UserError(f"{where}: column '{c.trace}' is {row.get(c.trace)!r:.60}, expected the reasoning as text")
        for name in _RESERVED:
            if name in columns:
                raise UserError(f"{where}: column '{name}' has the name of an argument of reward functions; rename it")
        return Example(
            uid=uid,
            prompt=prompt,
            answer=_answer(row[c.answer], f"{where}: column '{c.answer}'") if c.answer in row else "",
            task="rows",
            trace=row[c.trace] if c.trace else None,
            columns=columns,
            **texts,
        )


def _answer(value: Any, what: str) -> str:
    good = isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{what} is {value!r:.60}, expected text or a finite number")
    return str(value)
