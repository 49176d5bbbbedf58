"""Where a run begins: from scratch, from its own newest checkpoint, as a branch of a trunk, or from finished weights.

    resume        the same command again: the newest intact checkpoint in out_dir, every setting as it was
    branch_from   a trunk's checkpoint whose learning rate has not decayed: weights, moments, step and data go on, the phases
                  are new; the result equals the one long run bit for bit. So 17 of the paper's models cost 120k steps.
    init_from     any checkpoint, or a decoder of Hugging Face's: a new schedule from its weights (the paper's continued
                  pretraining), on rows not read yet
"""
import json
import os
import shlex
from dataclasses import dataclass, field, replace

import objectives
from core import checkpoint, tokenizer
from core.configurator import UserError, differences
from core.distributed import all_sum
from core.files import is_new, write_whole
from huggingface import importing
from model import SIZES, ModelConfig
from objectives import objective_at

# What may differ when a run goes on: where and how it runs, not what it computes.
FREE = {"data_dir", "out_dir", "resume", "save_interval", "keep_last", "milestones", "eval_interval", "log_interval",
        "wandb_log", "wandb_project", "micro_rows", "device", "compile", "attention", "checkpoint_activations"}
# What may differ between a trunk and its branch, on top: what comes after the branching point.
BRANCH = FREE | {"branch_from", "init_from", "keep_moments", "phases", "decay_steps", "eval_rows", "eval_mask_rate"}


@dataclass
class Start:
    """The state before a run's next step."""
    source: str = ""         # checkpoint to load, or where `foreign` came from; none from scratch
    foreign: importing.Imported | None = None     # a Hugging Face model
    moments: bool = False    # AdamW's moments as well
    step: int = 0            # steps done
    first_row: int = 0       # place in the data order where step 0 began
    # counted since the run's first ancestor began
    totals: dict = field(default_factory=lambda: {"tokens": 0, "targets": 0, "flops": 0, "seconds": 0.0})


def start(c, settings, processes, say):
    """Decide from out_dir, branch_from and init_from. settings: what the run is now, as saved with its checkpoints.

    Raises UserError, listing what changed, if the run or the trunk was trained otherwise; nothing is written here.
    """
    config_path = os.path.join(c.out_dir, "config.json")
    if os.path.isfile(config_path):
        if not c.resume:
            raise UserError(f"{c.out_dir} holds a run already: choose another --out_dir, or resume it with --resume=true")
        with open(config_path, encoding="utf-8") as f:
            theirs = json.load(f)["settings"]
        settings["size"] = settings["size"] or theirs["size"]
        changed = differences(theirs, settings, FREE)
        if changed:
            raise UserError(f"{c.out_dir} was begun with other settings ({'; '.join(changed)}): choose another --out_dir, "
                            "or go on from one of its checkpoints with --branch_from")
        # rank 0 reads and checks the files; the others hear which one it took
        newest = checkpoint.latest(c.out_dir, say) if processes.first else None
        step = int(all_sum([checkpoint.step_of(newest) + 1 if newest else 0], processes)[0]) - 1
        if step >= 0:
            return same_schedule(checkpoint.path_of(c.out_dir, step), "resuming", say)
    elif not is_new(c.out_dir, "tokenizer.tiktoken", "tokenizer_info.json"):      # these are written before config.json
        raise UserError(f"{c.out_dir} is not empty and holds no run: choose another --out_dir")
    if c.branch_from:
        source = checkpoint.find(c.branch_from)
        settings["size"] = settings["size"] or checkpoint.read_state(source)["settings"]["size"]
        check_trunk(checkpoint.read_state(source), c, settings, source)
        return same_schedule(source, "branching", say)
    if c.init_from:
        if importing.is_foreign(c.init_from):
            return from_foreign(c, settings, say)
        return new_schedule(checkpoint.find(c.init_from), c, settings, say)
    return Start()


def model_config(c, start, vocab_size):
    """What to build: a row of SIZES, or the model the run starts from if no size is given. Raises UserError if these differ."""
    if c.size:
        wanted = ModelConfig(**SIZES[c.size], vocab_size=vocab_size, block_size=c.block_size, tied=c.tied)
    if not start.source:
        return wanted
    there = start.foreign.config if start.foreign else checkpoint.config_of(start.source)
    here = wanted if c.size else replace(there, vocab_size=vocab_size, tied=c.tied or there.tied)
    checkpoint.same_model(there, here, start.source)
    return replace(there, block_size=c.block_size)


def from_foreign(c, settings, say):
    """A new schedule from a Hugging Face model, whose tokenizer the corpus must have been prepared with."""
    found = importing.read(c.init_from)
    if not found.tokenizer.same_ids(tokenizer.load(c.data_dir)):
        name = c.init_from if c.init_from.startswith("hf:") else f"hf:{c.init_from}"
        raise UserError(f"{c.data_dir} was prepared with another tokenizer than {c.init_from} has: prepare_fineweb.py "
                        f"--tokenizer={shlex.quote(name)}")
    say(importing.describe(found))
    return Start(c.init_from + (f"@{found.facts['revision']}" if found.facts["revision"] and "@" not in c.init_from else ""), found)


def same_schedule(source, word, say):
    state = checkpoint.read_state(source)
    say(f"{word} from {source}")
    return Start(source, None, True, state["step"], state["first_row"], state["totals"])


def new_schedule(source, c, settings, say):
    state = checkpoint.read_state(source)
    theirs = state.get("settings", {})      # weights from elsewhere have none
    if theirs.get("tokenizer_hash", settings["tokenizer_hash"]) != settings["tokenizer_hash"] and \
            not checkpoint.tokenizer_of(source).same_ids(tokenizer.load(c.data_dir)):
        raise UserError(f"{source} was trained with another tokenizer than {c.data_dir} was prepared with")
    begun = Start(source, None, c.keep_moments and os.path.isfile(os.path.join(source, "optimizer.safetensors")))
    begun.totals = state.get("totals", begun.totals)
    if (theirs.get("train_tokens"), theirs.get("block_size")) == (settings["train_tokens"], c.block_size):
        begun.first_row = state["first_row"] + state["step"] * theirs["batch_rows"]   # the same corpus: no row is read twice
    say(f"starting a new schedule from {source}, {'with' if begun.moments else 'without'} its moments")
    return begun


def check_trunk(state, c, settings, path):
    """A branch equals one long run only if the trunk did what this run would have done so far. Raises UserError."""
    theirs, step = state["settings"], state["step"]
    # Which masking settings mattered to the trunk? Checkpoints before 2026-11-26 do not record it.
    facts = state.get("objectives") or objectives.facts_of(theirs["phases"])
    trained_with = {objective_at(s, theirs["phases"]) for s in range(step)}
    hidden_with = [facts[name] for name in trained_with if facts[name]["hides_tokens"]]
    free = set(BRANCH)
    if not hidden_with:
        free.add("mask_replace")
    if all(fact["rate"] is not None for fact in hidden_with):
        free.add("mask_rate")
    changed = differences(theirs, settings, free)
    if changed:
        raise UserError(f"{path} was trained otherwise ({'; '.join(changed)}); --init_from starts anew from its weights")
    decay = sum(n for _, n in theirs["phases"]) - theirs["decay_steps"]
    if theirs["decay_steps"] and step > decay:
        raise UserError(f"{path} lies in its run's decay (from step {decay} on): branch from an earlier step, or start a "
                        "new schedule with --init_from")
    for s in range(step):
        if objective_at(s, c.phases) != objective_at(s, theirs["phases"]):
            raise UserError(f"phases={c.phases}: step {s} would be {objective_at(s, c.phases)}, but {path} was trained with "
                            f"{objective_at(s, theirs['phases'])} there; phases count from the trunk's beginning")
    total = sum(n for _, n in c.phases)
    if total <= step or total - c.decay_steps < step:
        raise UserError(f"phases={c.phases} with decay_steps={c.decay_steps} end or decay before step {step} of {path}; "
                        "phases count from the trunk's beginning")


def trim_log(path, step):
    """Drop what comes again, equal, when the run goes on behind `step`: later rows, the validation at `step` itself, and a
    last line that a kill cut off."""
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as f:
            rows = [(json.loads(line), line) for line in f if line.endswith("\n")]
        kept = [line for row, line in rows if row["step"] < step or row["step"] == step and "loss" in row]
        write_whole(path, "".join(kept).encode())
