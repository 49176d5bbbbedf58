"""Where a run begins: from scratch, from its own newest checkpoint, as a branch, or from other weights.

    resume        run the same command again: training continues from the newest intact checkpoint in
                  out_dir, and no setting that decides the result may change
    branch_from   continue from a checkpoint of another run, the trunk, from before its learning rate
                  decays: weights, optimizer state, step and data order continue, with new phases.
                  The result equals one long run bit for bit, so models that share their first steps
                  need to train these only once
    init_from     start a new schedule from the weights of any checkpoint, or of a Hugging Face model,
                  on rows that they were not trained on yet. The paper continues finished models, too,
                  but does not say whether optimizer state is kept (keep_moments)
"""

import os
import shlex
from dataclasses import dataclass, field, replace

from core import checkpoint, tokenizer
from core.configurator import UserError, differences
from core.distributed import all_sum
from core.files import is_new
from core.schema import read_json
from huggingface.history import NO_HEAD, has_lm_head
from model import SIZES, ModelConfig
from objectives import objective_at, recorded_objectives

# Settings that may change when a run resumes: where and how it runs, not what it computes.
FREE_IN_A_RESUME = {
    "data_dir", "out_dir", "resume", "save_interval", "keep_last", "milestones", "eval_interval",
    "log_interval", "wandb_log", "wandb_project", "micro_rows", "device", "compile", "attention",
    "checkpoint_activations", "timeout",
}
# A branch may also change these: how it began, and what comes after the branching point.
FREE_IN_A_BRANCH = FREE_IN_A_RESUME | {
    "branch_from", "init_from", "keep_moments", "phases", "decay_steps", "eval_rows", "eval_mask_rate",
}


# What is needed of a run's config.json, and of a checkpoint's state.json to continue its schedule.
CONFIG_SHAPE = {"settings": {"size": str}, "run_id": str}
RUN_SHAPE = checkpoint.STATE_SHAPE | {
    "settings": {
        "tokenizer_hash": str, "size": str, "phases": [[(str, int)]], "decay_steps": int, "batch_rows": int,
    },
    "first_row": int,
    "totals": {"tokens": int, "targets": int, "flops": int, "seconds": float},
    "objectives?": {str: {"is_causal": bool, "hides_tokens": bool, "rate": (float, None)}},
}


def zero_totals():
    return {"tokens": 0, "targets": 0, "flops": 0, "seconds": 0.0}


@dataclass
class Start:
    """Where a run begins: what to load, and how far it is."""

    source: str = ""  # the checkpoint to load, or the name of what `imported` holds; "": from scratch
    imported: object = None  # huggingface.importing.Imported: a Hugging Face model
    load_optimizer: bool = False  # load the optimizer state of the checkpoint, too
    step: int = 0  # steps done
    first_row: int = 0  # where in the data order step 0 begins: rows that its ancestors have read
    totals: dict = field(default_factory=zero_totals)  # since the run's first ancestor began


def start(c, run_settings, processes):
    """Decide where the run begins, from out_dir, branch_from and init_from. -> Start

    c: train.Config; run_settings: what the run's checkpoints record of it. Its "size" is filled in
    here if a checkpoint decides it. Raises UserError, listing what changed, if the run or the trunk
    was trained with other settings. Writes nothing.
    """
    # Resume, if out_dir holds this run.
    config_path = os.path.join(c.out_dir, "config.json")
    if os.path.isfile(config_path):
        if not c.resume:
            raise UserError(
                f"{c.out_dir} already holds a run: choose another --out_dir, "
                "or resume it with --resume=true"
            )
        old_settings = read_json(config_path, CONFIG_SHAPE)["settings"]
        run_settings["size"] = run_settings["size"] or old_settings["size"]
        changed = differences(old_settings, run_settings, FREE_IN_A_RESUME)
        if changed:
            raise UserError(
                f"{c.out_dir} was begun with other settings ({'; '.join(changed)}): choose another "
                "--out_dir, or continue from one of its checkpoints with --branch_from"
            )
        step = newest_step(c.out_dir, processes)
        if step is not None:
            return continue_from(checkpoint.path_of(c.out_dir, step), "resuming", processes)

    # Otherwise begin as the settings say.
    if c.branch_from:
        source = checkpoint.find(c.branch_from)
        state = read_run_state(source)
        run_settings["size"] = run_settings["size"] or state["settings"]["size"]
        check_trunk(state, c, run_settings, source)
        return continue_from(source, "branching", processes)
    if c.init_from:
        return from_weights(c, run_settings, processes)
    return Start()


def check_out_dir(out_dir):
    """Raises UserError if out_dir holds something other than a run."""
    if os.path.isfile(os.path.join(out_dir, "config.json")):
        return
    # A run that was interrupted before it wrote config.json has left its tokenizer.
    if not is_new(out_dir, "tokenizer.tiktoken", "tokenizer_info.json"):
        raise UserError(f"{out_dir} is not empty and holds no run: choose another --out_dir")


def newest_step(out_dir, processes):
    """The step of the newest intact checkpoint in out_dir, or None.

    The first process reads and checks the files, and the others hear which one it took.
    """
    newest = checkpoint.latest(out_dir, processes.print0) if processes.is_first else None
    # A sum hands it on: the others add 0, and so does the first if there is no checkpoint.
    step_plus_one = checkpoint.step_of(newest) + 1 if newest else 0
    step = int(all_sum([step_plus_one], processes)[0]) - 1
    return step if step >= 0 else None


def continue_from(source, verb, processes):
    """Continue the schedule of a checkpoint. verb: "resuming" or "branching". -> Start"""
    state = read_run_state(source)
    processes.print0(f"{verb} from {source}")
    return Start(
        source,
        load_optimizer=True,
        step=state["step"],
        first_row=state["first_row"],
        totals=state["totals"],
    )


def read_run_state(source):
    """The state.json of a checkpoint of train.py. Raises UserError if it has no schedule to continue."""
    state = checkpoint.read_state(source, RUN_SHAPE)
    for phase in state["settings"]["phases"]:
        if len(phase) != 2 or type(phase[0]) is not str or type(phase[1]) is not int:
            raise UserError(f"{source}/state.json: 'settings.phases' has {phase}, not [objective, steps]")
    if checkpoint.has_step_name(source) and checkpoint.step_of(source) != state["step"]:
        raise UserError(f"{source}/state.json says step {state['step']}: give the folder its own name back")
    return state


def from_weights(c, run_settings, processes):
    """Start a new schedule from the weights of a checkpoint or of a Hugging Face model. -> Start

    Raises UserError if the corpus was prepared with a tokenizer other than that of the weights.
    """
    from huggingface import importing  # most runs do not need it

    if not importing.is_foreign(c.init_from):
        return new_schedule(checkpoint.find(c.init_from), c, run_settings, processes)
    imported = importing.read(c.init_from)
    refuse_without_head(imported.facts.get("has_lm_head", True), c.init_from)
    if not imported.tokenizer.same_ids(tokenizer.load(c.data_dir)):
        source = c.init_from if c.init_from.startswith("hf:") else f"hf:{c.init_from}"
        raise UserError(
            f"{c.data_dir} was prepared with another tokenizer than {c.init_from} has: "
            f"prepare_fineweb.py --tokenizer={shlex.quote(source)}"
        )
    processes.print0(importing.describe(imported))
    # Name the commit of the hub that was read.
    source = c.init_from
    if imported.facts["revision"] and "@" not in source:
        source += f"@{imported.facts['revision']}"
    return Start(source, imported)


def refuse_without_head(has_head, source):
    """Raises UserError if pretraining cannot continue from a model because it has no LM head."""
    if not has_head:
        raise UserError(
            f"{source} cannot be trained further: {NO_HEAD}, which predicts the tokens; it can be "
            "fine-tuned (finetune.py, eval_ir.py)"
        )


def new_schedule(source, c, run_settings, processes):
    """Start a new schedule from the weights of a checkpoint, on rows that its run has not read. -> Start"""
    state = checkpoint.read_state(source)
    refuse_without_head(has_lm_head(state), source)
    old_settings = state.get("settings", {})
    # An imported or fine-tuned model has only its tokenizer's hash among the settings.
    if "phases" in old_settings:
        state = read_run_state(source)
    # The same tokenizer? Two with different hashes may still give the same ids.
    old_hash = old_settings.get("tokenizer_hash", run_settings["tokenizer_hash"])
    if old_hash != run_settings["tokenizer_hash"]:
        same_ids = checkpoint.tokenizer_of(source).same_ids(tokenizer.load(c.data_dir))
        if not same_ids:
            raise UserError(
                f"{source} was trained with another tokenizer than {c.data_dir} was prepared with"
            )

    beginning = Start(source, totals=state.get("totals", zero_totals()))
    has_optimizer_state = os.path.isfile(os.path.join(source, "optimizer.safetensors"))
    beginning.load_optimizer = c.keep_moments and has_optimizer_state
    # In the same corpus, begin after the rows that the weights were trained on.
    old_corpus = (old_settings.get("train_tokens"), old_settings.get("block_size"))
    if old_corpus == (run_settings["train_tokens"], c.block_size):
        beginning.first_row = state["first_row"] + state["step"] * old_settings["batch_rows"]
    with_or_without = "with" if beginning.load_optimizer else "without"
    processes.print0(f"starting a new schedule from {source}, {with_or_without} its optimizer state")
    return beginning


def model_config(c, beginning, vocab_size):
    """The ModelConfig of the run: a row of SIZES, or that of the weights it starts from.

    Raises UserError if the settings or the corpus ask for another model than these weights have.
    """
    if not beginning.source:
        return ModelConfig(**SIZES[c.size], vocab_size=vocab_size, block_size=c.block_size, tied=c.tied)
    if beginning.imported:
        stored = beginning.imported.config
    else:
        stored = checkpoint.config_of(beginning.source)
    if c.size:
        expected = ModelConfig(**SIZES[c.size], vocab_size=vocab_size, block_size=c.block_size, tied=c.tied)
    else:
        expected = replace(stored, vocab_size=vocab_size, tied=c.tied or stored.tied)
    checkpoint.same_model(stored, expected, beginning.source)
    return replace(stored, block_size=c.block_size)


def check_trunk(state, c, run_settings, path):
    """Raises UserError unless the trunk did what this run would have done so far.

    Only then does the branch equal one long run. state: the state.json of the trunk's checkpoint
    `path`
    """
    old_settings = state["settings"]
    old_phases = old_settings["phases"]
    step = state["step"]

    # The settings must agree. Those of masking are free if the trunk's steps did not use them:
    # mask_replace if none hid tokens, mask_rate if each objective that did has a rate in its name.
    facts = recorded_objectives(state)
    names = {objective_at(s, old_phases) for s in range(step)}
    hiding = [facts[name] for name in names if facts[name]["hides_tokens"]]
    free = set(FREE_IN_A_BRANCH)
    if not hiding:
        free.add("mask_replace")
    if all(objective["rate"] is not None for objective in hiding):
        free.add("mask_rate")
    changed = differences(old_settings, run_settings, free)
    if changed:
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(changed)}); "
            "--init_from starts a new schedule from its weights"
        )

    # The trunk's learning rate must not have decayed yet.
    decay_begins = sum(n for _, n in old_phases) - old_settings["decay_steps"]
    if old_settings["decay_steps"] and step > decay_begins:
        raise UserError(
            f"{path} lies in its run's decay (from step {decay_begins} on): "
            "branch from an earlier step, or start a new schedule with --init_from"
        )

    # The phases must agree up to this step, and neither end nor begin to decay before it.
    for s in range(step):
        if objective_at(s, c.phases) != objective_at(s, old_phases):
            raise UserError(
                f"phases={c.phases}: step {s} would be {objective_at(s, c.phases)}, "
                f"but {path} was trained with {objective_at(s, old_phases)} there; "
                "phases count from the trunk's beginning"
            )
    max_steps = sum(n for _, n in c.phases)
    if max_steps <= step or max_steps - c.decay_steps < step:
        raise UserError(
            f"phases={c.phases} with decay_steps={c.decay_steps} end or decay before step {step} "
            f"of {path}; phases count from the trunk's beginning"
        )
