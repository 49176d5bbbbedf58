"""What a checkpoint's state.json records about its training.

An export asks here, and never parses the name of an objective. So an objective that a fork adds is
exported correctly, even by a version that does not know it.
"""

from core.configurator import UserError
from core.schema import misfit
from objectives import objective_at, recorded_objectives

# What is read of a checkpoint's state.json, and of those of its ancestors inside it. See core/schema.py.
HISTORY_SHAPE = {"settings": {str: object}, "parent?": ({str: object}, None)}
PRETRAINING_SHAPE = {
    "step": int,
    "totals": {"tokens": int, "flops": float},
    "settings": {
        "phases": [[(str, int)]], "batch_rows": int, "block_size": int, "seed": int,
        "learning_rate": float, "beta1": float, "beta2": float, "adam_eps": float, "weight_decay": float,
        "warmup_steps": int, "decay_steps": int, "mask_rate": float, "eval_mask_rate": float,
        "branch_from": str, "init_from": str,
    },
    "objectives?": {str: {"is_causal": bool, "hides_tokens": bool, "rate": (float, None)}},
}
FINE_TUNING_SHAPE = {
    "model": str, "task": str, "mode": str, "steps": int, "lr": float, "seed": int, "causal?": bool,
    "validation?": ({"score?": float}, None), "test?": ({"score?": float}, None),
}
IMPORT_SHAPE = {
    "source": str, "revision": (str, None), "causal?": (bool, None), "has_lm_head?": bool,
}


def check_history(state, where):
    """Raises UserError if a state.json says of its training what we cannot read. where: its path"""
    for ancestor in lineage(state):
        problem = misfit(ancestor, HISTORY_SHAPE)
        if not problem and "phases" in ancestor["settings"]:
            problem = misfit(ancestor, PRETRAINING_SHAPE) or misfit_of_phases(ancestor)
        problem = problem or misfit(ancestor.get("fine_tuned", None), (FINE_TUNING_SHAPE, None))
        problem = problem or misfit(ancestor.get("imported", None), (IMPORT_SHAPE, None))
        if problem:
            raise UserError(f"{where}: {problem}")


def misfit_of_phases(state):
    """What is wrong with the phases of a run, in words; "" if nothing is."""
    phases = state["settings"]["phases"]
    for phase in phases:
        if [type(value) for value in phase] != [str, int]:
            return f"'settings.phases' has {phase}, not [objective, steps]"
        if phase[0] not in state.get("objectives", {phase[0]: {}}):
            return f"'objectives' lacks {phase[0]}, which is in 'settings.phases'"
    return "" if phases else "'settings.phases' is empty"


def was_causal(state):
    """True if a checkpoint was last trained under the causal mask.

    Raises UserError if its state does not say.
    """
    if "fine_tuned" in state:
        return bool(state["fine_tuned"].get("causal"))
    if "phases" in state["settings"]:
        last_step = max(0, state["step"] - 1)
        objective = objective_at(last_step, state["settings"]["phases"])
        return recorded_objectives(state)[objective]["is_causal"]
    is_causal = state.get("imported", {}).get("causal")
    if is_causal is None:
        raise UserError(
            "this checkpoint does not say whether it is a decoder or an encoder: "
            "--causal=true or --causal=false"
        )
    return is_causal


# Why some programs refuse an imported model.
NO_HEAD = "it was saved without its LM head"


def has_lm_head(state):
    """False if a checkpoint comes from a model that was imported without an LM head."""
    for ancestor in lineage(state):
        if not ancestor.get("imported", {}).get("has_lm_head", True):
            return False
    return True


def lineage(state):
    """Return the states of a checkpoint and of those it comes from, the newest first."""
    states = [state]
    while isinstance(states[-1], dict) and states[-1].get("parent"):
        states.append(states[-1]["parent"])
    return states
