"""The README.md of an exported model: what it is, how it was trained, how to load it.

Everything in it is a fact of the checkpoint, of those it comes from, or of the run's log.
"""

import json
import os
import re

from core import checkpoint
from core.configurator import UserError
from core.files import as_code, as_markdown
from core.schema import parse_json
from huggingface.history import lineage
from objectives import recorded_objectives

# What is read of a row of log.jsonl.
LOG_SHAPE = {"step": int, "val_clm_loss?": float, "val_mlm_loss?": float}
# {the end of a class's name: the hub's name for what such a model does}
PIPELINE_TAGS = {
    "": "sentence-similarity",
    "CausalLM": "text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
}


def model_card(path, paths, state, hub_config, config, n_parameters):
    """Return the text of README.md.

    path: the checkpoint; state: its state.json; paths: the checkpoints whose mean the weights are;
    hub_config: the content of the exported config.json; config: the ModelConfig.
    """
    architecture = hub_config["architectures"][0]
    run, step = os.path.abspath(path).split(os.sep)[-2:]
    states = lineage(state)
    fine_tuned = state.get("fine_tuned")
    title = f"{fine_tuned['model']} on {fine_tuned['task']}" if fine_tuned else run

    facts = shape_facts(architecture, config, n_parameters)
    if len(paths) > 1:
        steps = ", ".join(str(checkpoint.step_of(p)) for p in paths)
        facts.append(("weights", f"mean of the checkpoints of steps {steps}"))
    # The training, from this checkpoint back to where it began.
    for earlier in states:
        facts += fine_tuning_facts(earlier)
        facts += pretraining_facts(earlier)
        if earlier is state:
            facts += validation_facts(state, path)
        facts += import_facts(earlier)

    lines = ["---", *front_matter(architecture, hub_config, states), "---", ""]
    lines += [f"# {as_markdown(title)}", ""]
    lines += [
        f"Exported by nanoEncoder from {as_code(f'{run}/{step}')}; after arXiv 2507.00994. It has no "
        "licence until its owner names one.",
        "",
    ]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts]
    lines += ["", *how_to_load(auto_class(architecture))]
    return "\n".join(lines) + "\n"


def front_matter(architecture, hub_config, states):
    """Return the lines at the top that the hub reads."""
    library = "sentence-transformers" if architecture == "EuroBertModel" else "transformers"
    entries = {
        "library_name": library,
        "pipeline_tag": PIPELINE_TAGS[architecture.partition("For")[2]],
        "tags": ["nanoencoder", hub_config["model_type"]],
    }
    # The model of the hub that the training began from, if any.
    sources = [s["imported"]["source"] for s in states if "imported" in s]
    sources += [s["settings"].get("init_from", "") for s in states]
    for source in sources:
        if is_on_the_hub(source):
            entries["base_model"] = source.removeprefix("hf:").partition("@")[0]

    lines = []
    for key, value in entries.items():
        if isinstance(value, list) or not re.fullmatch(r"[\w./-]+", value):
            value = json.dumps(value)      # also YAML
        lines.append(f"{key}: {value}")
    return lines


# ---- rows of the table: (name, value), both Markdown


def shape_facts(architecture, config, n_parameters):
    """Return the rows about the model itself."""
    head = ""
    if architecture.endswith("LM"):
        head = ", the LM head is the embedding" if config.tied else " with the LM head"
    return [
        ("class", f"`{architecture}`, loads without remote code"),
        ("parameters", f"{n_parameters:,}{head}"),
        ("layers, width, FFN", f"{config.n_layer}, {config.n_embd}, {config.n_ffn}"),
        ("heads, KV heads, head dim", f"{config.n_head}, {config.n_kv_head}, {config.head_dim}"),
        ("context", f"{config.block_size:,} tokens"),
    ]


def fine_tuning_facts(state):
    """Return the rows about a trial of finetune.py or eval_ir.py."""
    row = state.get("fine_tuned")
    if not row:
        return []
    trial = f"{row['steps']} steps, learning rate {row['lr']:g}, seed {row['seed']}"
    facts = [("fine-tuned on", f"{as_markdown(row['task'])}: {trial}")]
    for split in ("validation", "test"):
        if row.get(split):
            score = f"{100 * row[split]['score']:.2f}, mode {as_markdown(row['mode'])}"
            facts.append((f"{split} score", score))
    return facts


def pretraining_facts(state):
    """Return the rows about a run of train.py."""
    s = state["settings"]
    if "phases" not in s:
        return []
    adamw = (
        f"AdamW, {s['learning_rate']:g}, betas {s['beta1']:g} and {s['beta2']:g}, "
        f"eps {s['adam_eps']:g}, weight decay {s['weight_decay']:g}"
    )
    schedule = f"warmup {s['warmup_steps']:,} steps, linear decay over the last {s['decay_steps']:,}"
    facts = [
        ("pretraining", f"{describe_phases(state)}; this is step {state['step']:,}"),
        ("tokens seen", f"{state['totals']['tokens']:,}"),
        ("a step", f"{s['batch_rows']:,} rows x {s['block_size']:,} tokens"),
        ("training FLOPs", f"{state['totals']['flops']:.3g}"),
        ("optimizer", adamw),
        ("schedule", schedule),
        ("seed", s["seed"]),
    ]
    for key in ("branch_from", "init_from"):
        if s[key]:
            facts.append(("continued from", as_markdown(public_name(s[key]))))
    return facts


def describe_phases(state):
    """Describe a run's phases: "20 steps CLM, then 20 steps MLM at 40% masking"."""
    s = state["settings"]
    objectives = recorded_objectives(state)
    phases = []
    for name, steps in s["phases"]:
        phase = f"{steps:,} steps {as_markdown(name.rstrip('0123456789').upper())}"
        if objectives[name]["hides_tokens"]:
            rate = objectives[name]["rate"] or s["mask_rate"]
            phase += f" at {rate:.0%} masking"
        phases.append(phase)
    return ", then ".join(phases)


def validation_facts(state, path):
    """Return the row of validation losses, from the log beside the checkpoint `path`."""
    log = os.path.join(os.path.dirname(os.path.abspath(path)), "log.jsonl")
    if "phases" not in state["settings"] or not os.path.isfile(log):
        return []
    # A resumed run may have logged the same step twice.
    newest = None
    with open(log, "rb") as f:
        for line in f:
            try:
                row = parse_json(line, log, LOG_SHAPE)
            except UserError:
                continue  # a blank or torn line
            if row["step"] == state["step"] and "val_mlm_loss" in row and "val_clm_loss" in row:
                newest = row
    if newest is None:
        return []
    losses = f"CLM {newest['val_clm_loss']:.4f}, MLM {newest['val_mlm_loss']:.4f} nats a target"
    return [("validation loss", f"{losses}, masking {state['settings']['eval_mask_rate']:.0%}")]


def import_facts(state):
    """Return the row about the Hugging Face model that the training began from."""
    imported = state.get("imported")
    if not imported:
        return []
    source = public_name(imported["source"])
    if imported["revision"]:
        source += f" at {imported['revision']}"
    return [("begun from", as_markdown(source))]


def is_on_the_hub(source):
    """True for hf:ORG/NAME, False for a folder, even if it is written as hf:FOLDER."""
    return source.startswith("hf:") and not os.path.isdir(source.removeprefix("hf:"))


def public_name(source):
    """Return a source without the folders of this machine: only the last two names of a path."""
    if is_on_the_hub(source):
        return source
    return "/".join(source.split(os.sep)[-2:])


# ---- how to load it


def auto_class(architecture):
    """Return the AutoModel class for a class of transformers: EuroBertForX -> AutoModelForX."""
    _, has_head, head = architecture.partition("For")
    return f"AutoModelFor{head}" if has_head else "AutoModel"


def how_to_load(auto):
    """Return lines with example code and notes on it. auto: the AutoModel class."""
    code = [
        f"from transformers import AutoTokenizer, {auto}",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        f'model = {auto}.from_pretrained("FOLDER")',
    ]
    notes = []
    if auto != "AutoModelForCausalLM":
        code += [
            "",
            "from sentence_transformers import SentenceTransformer",
            'model = SentenceTransformer("FOLDER")    # mean over tokens, length 1',
            'model.encode_query(["what is it?"]) @ model.encode_document(["a text", "another"]).T',
        ]
        notes.append(
            "tokenizer.json ends each text with the end-of-text token. The same token pads: use "
            "the attention mask."
        )
    if auto == "AutoModelForMaskedLM":
        notes.append("It was not trained to embed: fine-tune it before you search with it.")
    return ["```python", *code, "```", "", *notes]
