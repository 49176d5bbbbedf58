"""What a family of tasks provides, so that finetune.py can train and score any task of it.

A family is one class in one file: sequence_classification.py, token_classification.py and
question_answering.py. A new one derives from Family, and gets a line in registry.FAMILIES:

    read(row, where)                        a row of the data set -> an example, a dict
    key_text(example)                       the text that decides on which side of a cut it falls
    encode(examples, tokenizer, max_length) yields each example's sequences of tokens
    new_head(width)                         the untrained head
    targets(sequences, indices)             what some sequences are trained on, and how many targets
    loss(logits, batch)                     the sum of the targets' losses
    predict(outputs)                        one prediction an example, from the head's outputs
    score(split, predictions)               the scores of a split, and each example's own
    baseline(splits)                        the score of a prediction that reads no text

Examples are read once, and encoded once for each tokenizer (packing.py). The sequences of a split
are a dict of arrays over all its tokens, laid end to end; what else `encode` puts into it is
between the family's own methods.
"""
from dataclasses import dataclass

import torch.nn.functional as F

from core.configurator import UserError

# ---- what finetune.py hands to a family

@dataclass
class Split:
    """The training, validation or test data of a task."""
    examples: list         # what Family.read made of the rows
    sequences: dict        # the arrays that packing.encode made of the examples


@dataclass
class Outputs(Split):
    """A split, and what the head says about it."""
    logits: list           # one float32 array for each sequence: [outputs], or [tokens, outputs]


# ---- the base class

class Family:
    """One task of a family. Paper variants, which do as the paper's code does, are subclasses."""

    title = ""                    # for people: "sequence classification"
    has_output_per_token = True   # False: the head has one output for each sequence
    per_sequence = ()             # names of the arrays with one value a sequence instead of a token
    leaves_out_empty = False      # True: examples without text are left out

    def __init__(self, task, mode="standard"):
        """task: a registry.Task. mode: standard or paper."""
        self.task = task
        self.mode = mode

    def loss(self, logits, batch):
        """The sum of the cross-entropies of the targets "ids"; those of -100 do not count."""
        return F.cross_entropy(logits, batch.targets["ids"], reduction="sum", ignore_index=-100)

    def evaluate(self, validation, test):
        """Scores both splits: (scores, each example's own score) of validation, and of test.

        validation, test: Outputs. A family that tunes something, on validation only, overrides
        this.
        """
        validation_scores = self.score(validation, self.predict(validation))
        test_scores = self.score(test, self.predict(test))
        return validation_scores, test_scores


# ---- what several families use

def value(row, name, kind, where):
    """The field `name` of a row. Raises UserError, which names the row, if it is not a `kind`."""
    if not isinstance(row, dict) or name not in row:
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no field '{name}' (it has {fields})")
    if not isinstance(row[name], kind):
        type_name = type(row[name]).__name__
        raise UserError(f"{where}: the field '{name}' is {type_name}, not {kind.__name__}")
    return row[name]


def label_id(labels, label, where):
    """The id of a label that a row gives by id or name. Raises UserError if the task lacks it."""
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if type(label) is not int or not 0 <= label < len(labels):
        names = ", ".join(labels[:9])
        if len(labels) > 9:
            names += ", ..."
        raise UserError(f"{where}: label {label!r} is not in the table: "
                        f"{len(labels)} labels, {names}")
    return label


def mean(values):
    return sum(values) / len(values)
