"""A new task, and a new family of tasks, as a fork would add them: without a change to any other file.

A task of a known family is one entry of registry.TASKS, of one line here. A new family, multiple choice,
is one class of 46 lines and one line in registry.FAMILIES; its tasks are entries like the others.
"""
import numpy as np
import pytest
import torch.nn.functional as F
from test_finetune import rows as rows_of
from test_tasks import sst2

import finetune
from model import TokenHead
from reporting.read import read_trials
from reporting.tables import trial_table
from tasks import metrics, registry
from tasks.family import Family, field_of
from tasks.packing import rows
from tasks.registry import Task


@pytest.fixture
def scores(encoder, tmp_path, monkeypatch):
    """scores(name, task, **changes) adds a task to the table, runs a grid of one trial, and returns its row and the report's table."""
    def run(name, task, **changes):
        monkeypatch.setitem(registry.TASKS, name, task)
        settings = dict(ckpt=encoder, tasks=name, out_dir=str(tmp_path / "out"), lrs=(3e-3,), seeds=(0,), steps=10, dtype="float32",
                        device="cpu", cache_dir=str(tmp_path / "cache"))
        c = finetune.Config(**(settings | changes))
        finetune.main(c)
        row, = rows_of(c.out_dir).values()
        assert not row["failed"] and row["train_loss"][-1][1] < row["train_loss"][0][1]
        return row, trial_table(list(read_trials(c.out_dir).values()))
    return run


# ---- a task of each family: its rows, and one line

def moods():
    return {"train": sst2(200), "validation": sst2(30, 500), "test": sst2(30, 700)}


def places():
    words = "Ada went to Paris with Grace".split()
    return {split: [{"tokens": [*words, str(i)], "tags": ["O", "O", "O", "B-CITY", "O", "O", "O"]} for i in range(n)]
            for split, n in (("train", 100), ("validation", 20), ("test", 20))}


def authors():
    return {split: [{"context": f"Ada wrote program {i}.", "question": f"Who wrote program {i}?",
                     "answers": {"text": ["Ada"], "answer_start": [0]}} for i in range(n)]
            for split, n in (("train", 100), ("validation", 20), ("test", 20))}


@pytest.mark.parametrize("name, task, title", [
    ("moods", Task("sequence", ("bad", "good"), template="{sentence}", make=moods), "sequence classification"),
    ("places", Task("token", registry.iob2("CITY"), label="tags", make=places), "token classification"),
    ("authors", Task("span", make=authors), "question answering"),
])
def test_a_new_task_is_one_entry_of_the_table(scores, capsys, name, task, title):
    row, table = scores(name, task)
    assert row["task"] == name and row["kind"] == task.kind and f"{name}: {title}" in capsys.readouterr().out
    assert f"| {name} | clm_then_mlm-40 |" in table


# ---- a family of its own: multiple choice

class MultipleChoice(Family):
    """A question and its choices are one sequence; the head scores each choice at its last token."""

    title = "multiple choice"
    per_sequence = ("target",)

    def read(self, row, where):
        return {"question": field_of(row, "question", str, where), "choices": field_of(row, "choices", list, where),
                "answer": field_of(row, "answer", int, where)}

    def key_text(self, example):
        return example["question"]

    def encode(self, examples, tokenizer, max_length):
        for index, example in enumerate(examples):
            choices = [tokenizer.encode(f"\n{choice}") for choice in example["choices"]]
            room = max_length - 1 - sum(map(len, choices))
            question = tokenizer.encode(example["question"])
            tokens, is_end = question[:room], [False] * len(question[:room])
            for choice in choices:
                tokens += choice
                is_end += [False] * (len(choice) - 1) + [True]
            yield index, [{"tokens": np.array([*tokens, tokenizer.eos_id], np.int32), "is_end": np.array([*is_end, False]),
                           "target": np.array(example["answer"])}], len(question) > room

    def new_head(self, width):
        return TokenHead(width, 1)

    def targets(self, sequences, indices):
        return {"ids": sequences["target"][indices], "is_end": rows(sequences, "is_end", indices)}, len(indices)

    def loss(self, logits, batch):
        choice_logits = logits[batch.targets["is_end"], 0].view(len(batch.lengths), -1)           # [T, 1] -> [S, choices]
        return F.cross_entropy(choice_logits, batch.targets["ids"], reduction="sum")

    def predict(self, outputs):
        return [int(token_logits[rows(outputs.sequences, "is_end", [i]), 0].argmax()) for i, token_logits in enumerate(outputs.logits)]

    def score(self, split, predictions):
        answers = [example["answer"] for example in split.examples]
        is_right = [float(answer == prediction) for answer, prediction in zip(answers, predictions)]
        return {"score": metrics.accuracy(answers, predictions)}, is_right

    def baseline(self, splits):
        scores, _ = self.score(splits["test"], [0] * len(splits["test"].examples))
        return {"name": "first choice", "score": scores["score"]}


def riddles():
    """The answer is the choice that stands in the question."""
    colours = ("red", "green", "blue")
    def row(i):
        return {"question": f"Item {i} is {colours[i * i % 3]}. Its colour?", "choices": [colours[(k + i) % 3] for k in range(3)],
                "answer": [colours[(k + i) % 3] for k in range(3)].index(colours[i * i % 3])}
    return {"train": [row(i) for i in range(200)], "test": [row(i) for i in range(500, 550)]}


@pytest.mark.parametrize("mode", ["standard", "paper"])
def test_a_new_family_is_one_class_and_one_line(scores, monkeypatch, capsys, mode):
    monkeypatch.setitem(registry.FAMILIES, "choice", MultipleChoice)
    row, table = scores("riddles", Task("choice", make=riddles), mode=mode, steps=30, micro_tokens=300)
    assert row["kind"] == "choice" and row["test"]["n"] == 50 and 0 < row["validation"]["n"] < 30
    assert row["baseline"]["name"] == "first choice" and "riddles: multiple choice, " in capsys.readouterr().out
    assert "| riddles | clm_then_mlm-40" in table and "(first choice)" in table
