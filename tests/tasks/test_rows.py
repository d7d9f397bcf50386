"""TRL's formats, and every way to get them wrong."""

import json

import pytest

from dllm_rl import registry
from dllm_rl.tasks.messages import shared_prompt
from dllm_rl.tasks.rows import Rows

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
SAY = [{"role": "assistant", "content": "4"}]
OTHER = [{"role": "assistant", "content": "5"}]


@pytest.fixture
def task(tmp_path):
    def make(*rows, **options):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Rows(Rows.Config(train_file=str(path), **options))

    return make


@pytest.fixture
def load(task):
    return lambda *rows, **options: task(*rows, **options).examples("train")


def test_prompt_only(load):
    text, number = load({"prompt": "2+2?", "answer": "4", "level": 3}, {"prompt": "2.5?", "answer": 2.5, "level": 1})
    assert (text.prompt, text.answer, text.completion, dict(text.columns)) == ("2+2?", "4", None, {"level": 3})
    assert number.answer == "2.5" and text.uid != number.uid
    (conversation,) = load({"prompt": ASK})
    assert conversation.prompt == ASK and conversation.answer == ""


def test_prompt_completion(load):
    assert load({"prompt": "2+2?", "completion": "4"})[0].completion == "4"
    assert load({"prompt": ASK, "completion": SAY})[0].completion == "4"


def test_preference(load):
    for row in ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {"prompt": ASK, "chosen": SAY, "rejected": OTHER}):
        (example,) = load(row)
        assert (example.chosen, example.rejected, example.completion) == ("4", "5", None)


def test_column_names_are_the_users(load):
    (example,) = load({"question": "2+2?", "gold": "4", "answer": "seen"}, prompt="question", answer="gold")
    assert (example.prompt, example.answer, dict(example.columns)) == ("2+2?", "4", {"answer": "seen"})


GOOD = {"prompt": "2+2?", "answer": "4"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2+2?"}, "no column 'prompt'; the row has question"),
        ({"prompt": ""}, "expected text or a list of messages, not empty"),
        ({"prompt": 7}, "column 'prompt' is 7"),
        ({"prompt": []}, "not empty"),
        ({"prompt": ["hi"]}, "message 1 is 'hi'"),
        ({"prompt": [{"role": "user"}]}, "message 1"),
        ({"prompt": [{"role": "bot", "content": "hi"}]}, "one of system, user, assistant, tool"),
        ({"prompt": [{"role": "user", "content": ["hi"]}]}, "message 1"),
        ({"prompt": [*ASK, *SAY]}, "ends with an assistant message"),
        ({"prompt": "2+2?", "completion": SAY}, "is a message list, but the prompt is text"),
        ({"prompt": ASK, "completion": "4"}, "is text, but the prompt is a message list"),
        ({"prompt": ASK, "completion": [*SAY, *ASK, *SAY]}, "exactly one assistant message"),
        ({"prompt": "2+2?", "chosen": "4"}, "both 'chosen' and 'rejected'"),
        ({"prompt": "2+2?", "completion": "4", "chosen": "4", "rejected": "5"}, "a row has 'completion', or both"),
        ({"prompt": "2+2?", "answer": None}, "column 'answer' is None"),
        ({"prompt": "2+2?", "answer": ["4"]}, "column 'answer'"),
        ({"messages": ASK}, "must end with an assistant message"),
        ({"messages": SAY}, "must end with an assistant message"),
        ({"chosen": "4", "rejected": "5"}, "do not share a beginning"),
        ({"chosen": "2+2?", "rejected": "2+2? 4"}, "do not share a beginning"),
        ({"chosen": "2+2? 4", "rejected": [*ASK, *OTHER]}, "must both be text, or both be message lists"),
        ({"prompt": "2+2?", "answer": "4", "completions": "x"}, "column 'completions' has the name of an argument"),
        (
            {"prompt": "2+2?", "answer": "4", "completion": "4"},
            "is prompt-completion text with 'answer', but the first",
        ),
        ({"prompt": "2+2?"}, "prompt-only text without 'answer', but the first row is prompt-only text with"),
        ({"prompt": ASK, "answer": "4"}, "prompt-only conversation"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(load, row, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(GOOD, row)
    assert "mine.jsonl, line 2" in str(caught.value)


def test_without_a_test_file_there_are_no_test_rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD))
    assert Rows(Rows.Config(train_file=str(path))).examples("test") == []
    assert len(Rows(Rows.Config(train_file=str(path), test_file=str(path))).examples("test")) == 1


def test_rewards_and_canary_follow_the_users_words(load):
    task = Rows(Rows.Config(train_file="x.jsonl", success="math_answer", gold="It is {answer}."))
    assert task.rewards == ("math_answer",) and task.success == "math_answer"
    assert Rows(Rows.Config(train_file="x.jsonl")).rewards == ()
    assert task.self_test(load(GOOD)[0]) == ("It is 4.", "")
    assert task.self_test(load({"prompt": "2+2?", "completion": "4"})[0]) == ("4", "")
    assert task.self_test(load({"prompt": "2+2?"})[0]) is None, "nothing is known to be right"


def test_messages_are_a_prompt_and_the_last_answer(load):
    (example,) = load({"messages": [*ASK, *SAY, ASK[1], *OTHER], "level": 2})
    assert (example.prompt, example.completion) == ([*ASK, *SAY, ASK[1]], "5")
    assert dict(example.columns) == {"level": 2}
    (padded,) = load({"messages": [{**m, "tool_calls": None} for m in (*ASK, *SAY)]})
    assert (padded.prompt, padded.completion) == (ASK, "4"), "parquet has every key in every message"


PAIRS = [
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "2+2?4", "rejected": "2+2?5"},
    {"chosen": [*ASK, *SAY], "rejected": [*ASK, *OTHER]},
]


def test_preferences_without_a_prompt_share_it(load):
    first, second, third = (load(pair)[0] for pair in PAIRS)
    assert (first.prompt, first.chosen, first.rejected) == ("The sky is", " blue.", " green.")
    assert (second.prompt, second.chosen, second.rejected) == ("2+2?", "4", "5")
    assert (third.prompt, third.chosen, third.rejected) == (ASK, "4", "5")


@pytest.mark.parametrize("pair", PAIRS)
def test_the_shared_prompt_is_that_of_trl(pair):
    data_utils = pytest.importorskip("trl.data_utils")
    prompt, rest = shared_prompt(pair, "line 1")
    assert {"prompt": prompt, **rest} == data_utils.extract_prompt(pair)


def test_every_column_name_is_the_users(load):
    (pair,) = load({"q": "2+2?", "yes": "4", "no": "5"}, prompt="q", chosen="yes", rejected="no")
    assert (pair.prompt, pair.chosen, pair.rejected, dict(pair.columns)) == ("2+2?", "4", "5", {})
    assert load({"q": "2+2?", "a": "4"}, prompt="q", completion="a")[0].completion == "4"
    assert load({"conversation": [*ASK, *SAY]}, messages="conversation")[0].completion == "4"


MANY = [{"prompt": f"{n % 20}+1?", "answer": n % 20 + 1} for n in range(40)]


def test_a_fraction_is_held_out_by_prompt(task):
    own = task(*MANY, test_fraction=0.25)
    train, test = own.examples("train"), own.examples("test")
    assert len({e.prompt for e in test}) == 5 and len(test) == 10, "a quarter of 20 prompts, with both of their rows"
    assert not {e.prompt for e in train} & {e.prompt for e in test} and len(train) == 30
    assert [e.uid for e in task(*MANY, test_fraction=0.25).examples("test")] == [e.uid for e in test]
    other = task(*MANY, test_fraction=0.25, split_seed=1).examples("test")
    assert {e.prompt for e in other} != {e.prompt for e in test}
    with pytest.raises(ValueError, match="holds out all of 1 prompts"):
        task(MANY[0], test_fraction=0.5).examples("train")
    with pytest.raises(ValueError, match="give one"):
        task(*MANY, test_fraction=0.25, test_file="x.jsonl")


def test_few_shot_examples_come_first_and_are_not_trained_on(task, tmp_path):
    own = task(*MANY[:4], few_shot=2, gold="It is {answer}.")
    assert [e.prompt for e in own.examples("train")] == [f"0+1?It is 1.\n\n1+1?It is 2.\n\n{n}+1?" for n in (2, 3)]
    chat = [{"prompt": [*ASK[:1], {"role": "user", "content": f"{n}?"}], "completion": SAY} for n in range(2)]
    (tmp_path / "shots.jsonl").write_text(json.dumps(chat[0]) + "\n")
    (first, _) = task(*chat, few_shot=1, few_shot_file=str(tmp_path / "shots.jsonl")).examples("train")
    assert [m["content"] for m in first.prompt] == ["Be brief.", "0?", "4", "0?"]
    with pytest.raises(ValueError, match="few_shot = 3: there are 3 rows"):
        task(*MANY[:3], few_shot=3).examples("train")
    with pytest.raises(ValueError, match="neither completion nor answer"):
        task({"prompt": "a"}, {"prompt": "b"}, few_shot=1).examples("train")


def test_rows_of_a_saved_folder_have_their_own_test_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "dev")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "mine")
    own = Rows(Rows.Config(train_file=str(tmp_path / "mine"), test_split="dev"))
    assert [e.prompt for e in (*own.examples("train"), *own.examples("test"))] == ["train", "dev"]


def test_one_source_is_named():
    for options in ({}, {"train_file": "a.jsonl", "hub": "me/mine"}):
        with pytest.raises(ValueError, match=r"exactly one of data\.task\.train_file"):
            Rows.Config(**options)


def test_the_old_name_says_the_new_one():
    with pytest.raises(ValueError, match="unknown task 'jsonl'; it is 'rows' now"):
        registry.load("tasks", "jsonl")
