"""What a checkpoint's state.json records about its training.

An export asks here, and never parses the name of an objective. So an objective that a fork adds is
exported correctly, even by a version that does not know it.
"""

from core.configurator import UserError
from objectives import objective_at, recorded_objectives


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
    while states[-1].get("parent"):
        states.append(states[-1]["parent"])
    return states
