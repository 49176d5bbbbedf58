"""Where a run begins: from scratch, from its own newest checkpoint, as a branch, or from other
weights.

resume        run the same command again: training continues from the newest intact checkpoint in
              out_dir, with every setting unchanged
branch_from   continue from a checkpoint of another run (the trunk) whose learning rate has not
              decayed: weights, optimizer state, step and data order continue, the phases are new.
              The result equals one long run bit for bit, so 17 of the paper's models cost 120k
              steps
init_from     start a new schedule from the weights of any checkpoint, or of a Hugging Face model, on
              rows that were not read yet (the paper's continued pretraining)
"""

import os
import shlex
from dataclasses import dataclass, field, replace

import objectives
from core import checkpoint, tokenizer
from core.configurator import UserError, differences
from core.distributed import all_sum
from core.files import is_new, read_json
from model import SIZES, ModelConfig
from objectives import objective_at

# Settings that may differ when a run resumes: where and how it runs, not what it computes.
FREE = {
    "data_dir",
    "out_dir",
    "resume",
    "save_interval",
    "keep_last",
    "milestones",
    "eval_interval",
    "log_interval",
    "wandb_log",
    "wandb_project",
    "micro_rows",
    "device",
    "compile",
    "attention",
    "checkpoint_activations",
}
# Settings that may also differ between a trunk and its branch: what comes after the branching
# point.
BRANCH = FREE | {
    "branch_from",
    "init_from",
    "keep_moments",
    "phases",
    "decay_steps",
    "eval_rows",
    "eval_mask_rate",
}


def zero_totals():
    return {"tokens": 0, "targets": 0, "flops": 0, "seconds": 0.0}


@dataclass
class Start:
    """The state before a run's next step."""

    source: str = ""  # the checkpoint to load, or where `imported` came from; "" from scratch
    imported: object = None  # huggingface.importing.Imported: a Hugging Face model
    load_optimizer: bool = False  # load the optimizer state of the checkpoint, too
    step: int = 0  # steps done
    first_row: int = 0  # place in the data order where step 0 began
    totals: dict = field(default_factory=zero_totals)  # since the run's first ancestor began


def start(c, settings, processes, say):
    """Decide where the run begins, from out_dir, branch_from and init_from. -> Start

    c: train.Config; settings: what the run's checkpoints record of it, whose "size" is filled in
    here. Raises UserError, listing what changed, if the run or the trunk was trained with other
    settings. Writes nothing.
    """
    # Resume, if out_dir holds this run.
    config_path = os.path.join(c.out_dir, "config.json")
    if os.path.isfile(config_path):
        if not c.resume:
            raise UserError(
                f"{c.out_dir} already holds a run: choose another --out_dir, or resume it with --resume=true"
            )
        old_settings = read_json(config_path)["settings"]
        settings["size"] = settings["size"] or old_settings["size"]
        changed = differences(old_settings, settings, FREE)
        if changed:
            raise UserError(
                f"{c.out_dir} was begun with other settings ({'; '.join(changed)}): choose another "
                "--out_dir, or continue from one of its checkpoints with --branch_from"
            )
        step = newest_step(c.out_dir, processes, say)
        if step is not None:
            return continue_from(checkpoint.path_of(c.out_dir, step), "resuming", say)
    elif not is_new(
        c.out_dir, "tokenizer.tiktoken", "tokenizer_info.json"
    ):  # written before config.json
        raise UserError(f"{c.out_dir} is not empty and holds no run: choose another --out_dir")

    # Otherwise begin as the settings say.
    if c.branch_from:
        source = checkpoint.find(c.branch_from)
        state = checkpoint.read_state(source)
        settings["size"] = settings["size"] or state["settings"]["size"]
        check_trunk(state, c, settings, source)
        return continue_from(source, "branching", say)
    if c.init_from:
        return from_weights(c, settings, say)
    return Start()


def newest_step(out_dir, processes, say):
    """The step of the newest intact checkpoint in out_dir, or None.

    The first process reads and checks the files, and the others hear which one it took.
    """
    newest = checkpoint.latest(out_dir, say) if processes.is_first else None
    step_plus_one = checkpoint.step_of(newest) + 1 if newest else 0
    step = int(all_sum([step_plus_one], processes)[0]) - 1
    return step if step >= 0 else None


def continue_from(source, word, say):
    """Continue the schedule of a checkpoint. word: "resuming" or "branching"."""
    state = checkpoint.read_state(source)
    say(f"{word} from {source}")
    return Start(
        source,
        load_optimizer=True,
        step=state["step"],
        first_row=state["first_row"],
        totals=state["totals"],
    )


def new_schedule(source, c, settings, say):
    """Start a new schedule from the weights of a checkpoint, on rows that its run has not read."""
    state = checkpoint.read_state(source)
    old_settings = state.get("settings", {})  # imported weights have none
    # The same tokenizer? Two with different hashes may still give the same ids.
    old_hash = old_settings.get("tokenizer_hash", settings["tokenizer_hash"])
    if old_hash != settings["tokenizer_hash"]:
        same_ids = checkpoint.tokenizer_of(source).same_ids(tokenizer.load(c.data_dir))
        if not same_ids:
            raise UserError(
                f"{source} was trained with another tokenizer than {c.data_dir} was prepared with"
            )

    beginning = Start(source, totals=state.get("totals", zero_totals()))
    has_optimizer_state = os.path.isfile(os.path.join(source, "optimizer.safetensors"))
    beginning.load_optimizer = c.keep_moments and has_optimizer_state
    old_corpus = (old_settings.get("train_tokens"), old_settings.get("block_size"))
    if old_corpus == (
        settings["train_tokens"],
        c.block_size,
    ):  # the same corpus: no row is read twice
        beginning.first_row = state["first_row"] + state["step"] * old_settings["batch_rows"]
    with_or_without = "with" if beginning.load_optimizer else "without"
    say(f"starting a new schedule from {source}, {with_or_without} its optimizer state")
    return beginning


def from_weights(c, settings, say):
    """Start a new schedule from the weights of a checkpoint or of a Hugging Face model.

    The corpus must have been prepared with the tokenizer of a Hugging Face model.
    """
    from huggingface import importing  # most runs do not need it

    if not importing.is_foreign(c.init_from):
        return new_schedule(checkpoint.find(c.init_from), c, settings, say)
    imported = importing.read(c.init_from)
    if not imported.tokenizer.same_ids(tokenizer.load(c.data_dir)):
        source = c.init_from if c.init_from.startswith("hf:") else f"hf:{c.init_from}"
        raise UserError(
            f"{c.data_dir} was prepared with another tokenizer than {c.init_from} has: "
            f"prepare_fineweb.py --tokenizer={shlex.quote(source)}"
        )
    say(importing.describe(imported))
    source = c.init_from
    if imported.facts["revision"] and "@" not in source:
        source += f"@{imported.facts['revision']}"
    return Start(source, imported)


def model_config(c, beginning, vocab_size):
    """The ModelConfig to build: a row of SIZES, or that of the weights the run starts from.

    Raises UserError if --size names another model than these weights have.
    """
    if not beginning.source:
        return ModelConfig(
            **SIZES[c.size], vocab_size=vocab_size, block_size=c.block_size, tied=c.tied
        )
    stored = (
        beginning.imported.config if beginning.imported else checkpoint.config_of(beginning.source)
    )
    if c.size:
        expected = ModelConfig(
            **SIZES[c.size], vocab_size=vocab_size, block_size=c.block_size, tied=c.tied
        )
    else:
        expected = replace(stored, vocab_size=vocab_size, tied=c.tied or stored.tied)
    checkpoint.same_model(stored, expected, beginning.source)
    return replace(stored, block_size=c.block_size)


def check_trunk(state, c, settings, path):
    """A branch equals one long run only if the trunk did what this run would have done so far.

    state: the trunk's state.json. Raises UserError.
    """
    old_settings = state["settings"]
    old_phases = old_settings["phases"]
    step = state["step"]

    # Which masking settings mattered to the trunk? (Checkpoints before 2026-11-26 do not record
    # it.)
    facts = state.get("objectives") or objectives.facts_of(old_phases)
    names = {objective_at(s, old_phases) for s in range(step)}
    hiding = [facts[name] for name in names if facts[name]["hides_tokens"]]
    free = set(BRANCH)
    if not hiding:
        free.add("mask_replace")
    if all(fact["rate"] is not None for fact in hiding):
        free.add("mask_rate")
    changed = differences(old_settings, settings, free)
    if changed:
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(changed)}); --init_from starts a new "
            "schedule from its weights"
        )

    # The trunk's learning rate must not have decayed yet.
    decay_begins = sum(n for _, n in old_phases) - old_settings["decay_steps"]
    if old_settings["decay_steps"] and step > decay_begins:
        raise UserError(
            f"{path} lies in its run's decay (from step {decay_begins} on): branch from an earlier step, "
            "or start a new schedule with --init_from"
        )
    # The phases must agree up to here, and must not end or decay before.
    for s in range(step):
        if objective_at(s, c.phases) != objective_at(s, old_phases):
            raise UserError(
                f"phases={c.phases}: step {s} would be {objective_at(s, c.phases)}, but {path} was trained "
                f"with {objective_at(s, old_phases)} there; phases count from the trunk's beginning"
            )
    total = sum(n for _, n in c.phases)
    if total <= step or total - c.decay_steps < step:
        raise UserError(
            f"phases={c.phases} with decay_steps={c.decay_steps} end or decay before step {step} of "
            f"{path}; phases count from the trunk's beginning"
        )
