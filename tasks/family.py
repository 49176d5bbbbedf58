"""What a family of tasks provides, so that finetune.py can train and score any task of it.

A family is one class in one file: sequence_classification.py, token_classification.py and
question_answering.py. A new one derives from Family, and gets a line in registry.FAMILIES:

    read(row, where)                        a row of the data set -> an example, a dict
    key_text(example)                       the text whose hash puts it in training or validation
    encode(examples, tokenizer, max_length) yields (example index, its sequences, whether it is cut)
    new_head(width)                         the untrained head
    targets(sequences, indices)             {name: array} that the loss needs, number of targets
    loss(logits, batch)                     the sum of the targets' losses
    predict(outputs)                        one prediction per example, from the head's outputs
    score(split, predictions)               the scores of a split, and each example's own
    baseline(splits)                        the score of a prediction that needs no training

`where` names a row in error messages, such as "sst2, train row 7". Examples are encoded once for
each tokenizer and max_length. A sequence is a dict of "tokens" and of arrays that the family's
other methods need. packing.py joins them: `sequences` is one dict of arrays for a whole split.
"""
from dataclasses import dataclass

import torch.nn.functional as F

from core.configurator import UserError

# ---- what finetune.py passes to a family

@dataclass
class Split:
    """The training, validation or test data of a task."""
    examples: list         # what Family.read made of the rows
    sequences: dict        # the arrays that packing.encode made of the examples


@dataclass
class Outputs(Split):
    """A split, and the head's outputs for its sequences."""
    logits: list           # one float32 array per sequence: [outputs], or [tokens, outputs]


# ---- the base class

class Family:
    """One task of a family. Where the paper's code differs, a subclass does as the paper's code."""

    title = ""                    # as it is printed, such as "sequence classification"
    has_output_per_token = True   # False: the head has one output per sequence
    per_sequence = ()             # encode's arrays with a value per sequence instead of per token
    leaves_out_empty = False      # True: examples without text are left out
    notes = ()                    # what a reader of the scores should know about the task

    def __init__(self, task, mode="standard"):
        """task: a registry.Task. mode: standard or paper."""
        self.task = task
        self.mode = mode

    def loss(self, logits, batch):
        """The sum of the cross-entropies of the targets "ids". A target of -100 does not count."""
        return F.cross_entropy(logits, batch.targets["ids"], reduction="sum", ignore_index=-100)

    def evaluate(self, validation, test):
        """Scores both splits. -> (scores, each example's own) of validation, the same of test

        validation, test: Outputs. A family that tunes something overrides this, and tunes it on
        validation.
        """
        validation_scores = self.score(validation, self.predict(validation))
        test_scores = self.score(test, self.predict(test))
        return validation_scores, test_scores


# ---- what several families use

def field_of(row, name, expected_type, where):
    """The field `name` of a row. Raises UserError if it is missing or of another type.

    expected_type: a type, or a tuple of several.
    """
    if not isinstance(row, dict) or name not in row:
        fields = shortened(", ".join(row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no field '{name}' (it has {fields})")
    if not isinstance(row[name], expected_type):
        type_name = type(row[name]).__name__
        expected_types = expected_type if isinstance(expected_type, tuple) else (expected_type,)
        names = " or ".join(one.__name__ for one in expected_types)
        raise UserError(f"{where}: the field '{name}' is {type_name}, not {names}")
    return row[name]


def label_id(labels, label, where):
    """The id of a label, which a row gives as an id or a name. Raises UserError if it has none."""
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if type(label) is not int or not 0 <= label < len(labels):
        names = ", ".join(labels[:9])
        if len(labels) > 9:
            names += ", ..."
        raise UserError(f"{where}: label {shortened(repr(label))} is not in the table: "
                        f"{len(labels)} labels, {names}")
    return label


def shortened(text):
    """A text as part of a message, of at most 80 characters."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def mean(values):
    return sum(values) / len(values)
