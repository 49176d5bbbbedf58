"""The README.md of an exported model: what it is, how it was trained, how to load it."""
import json
import os

from core import checkpoint
from core.files import table_cell
from objectives import facts_of

# ---- the model card: facts of the checkpoint and of those it comes from, none made up

def model_card(path, paths, state, about, config, parameters):
    """README.md: what it is, where it comes from, how to load it."""
    kind, chain, place = about["architectures"][0], [state], os.path.abspath(path).split(os.sep)
    tuned = state.get("fine_tuned")
    title = f"{tuned['model']} on {tuned['task']}" if tuned else place[-2]
    while chain[-1].get("parent"):
        chain.append(chain[-1]["parent"])
    family = {"": "sentence-similarity", "CausalLM": "text-generation", "MaskedLM": "fill-mask",
              "SequenceClassification": "text-classification", "TokenClassification": "token-classification"}
    front = {"library_name": "sentence-transformers" if kind == "EuroBertModel" else "transformers",
             "pipeline_tag": family[kind.partition("For")[2]], "tags": ["nanoencoder", about["model_type"]]}
    sources = [s["imported"]["source"] for s in chain if "imported" in s] + [s["settings"].get("init_from", "") for s in chain]
    for source in sources:
        if source.startswith("hf:") and not os.path.isdir(source[3:]):
            front["base_model"] = source[3:].partition("@")[0]
    head = (", the LM head is the embedding" if config.tied else " with the LM head") * kind.endswith("LM")
    facts = [("class", f"`{kind}`, loads without remote code"),
             ("parameters", f"{parameters:,}{head}"),
             ("layers, width, FFN", f"{config.n_layer}, {config.n_embd}, {config.n_ffn}"),
             ("heads, KV heads, head dim", f"{config.n_head}, {config.n_kv_head}, {config.head_dim}"),
             ("context", f"{config.block_size:,} tokens")]
    if len(paths) > 1:
        facts.append(("weights", f"mean of the checkpoints of steps {', '.join(str(checkpoint.step_of(p)) for p in paths)}"))
    for s in chain:
        facts += [*fine_tuning(s), *pretraining(s, path if s is state else ""), *beginning(s)]
    lines = ["---", *(f"{key}: {json.dumps(value) if isinstance(value, list) else value}" for key, value in front.items()), "---",
             "", f"# {title}", "", f"Exported by nanoEncoder from `{place[-2]}/{place[-1]}`; after arXiv 2507.00994. It has no "
             "licence until its owner names one.", "", "| | |", "|---|---|",
             *(f"| {name} | {table_cell(str(value))} |" for name, value in facts), "", *how_to_load(auto_class(kind))]
    return "\n".join(lines) + "\n"


def fine_tuning(state):
    """Lines of the table about a trial of finetune.py or eval_ir.py."""
    row = state.get("fine_tuned")
    if not row:
        return []
    return [("fine-tuned on", f"{row['task']}: {row['steps']} steps, learning rate {row['lr']:g}, seed {row['seed']}"),
            *((f"{split} score", f"{100 * row[split]['score']:.2f}, mode {row['mode']}") for split in ("validation", "test")
              if row.get(split))]


def pretraining(state, path):
    """Lines about a run of train.py. path: its checkpoint, if its log is at hand for validation losses"""
    s = state["settings"]
    if "phases" not in s:
        return []
    facts = state.get("objectives") or facts_of(s["phases"])
    parts = []
    for objective, n in s["phases"]:
        part = f"{n:,} steps {objective.rstrip('0123456789').upper()}"
        if facts[objective]["hides_tokens"]:
            part += f" at {facts[objective]['rate'] or s['mask_rate']:.0%} masking"
        parts.append(part)
    phases = ", then ".join(parts)
    found = [("pretraining", f"{phases}; this is step {state['step']:,}"), ("tokens seen", f"{state['totals']['tokens']:,}"),
             ("a step", f"{s['batch_rows']:,} rows x {s['block_size']:,} tokens"),
             ("training FLOPs", f"{state['totals']['flops']:.3g}"),
             ("optimizer", f"AdamW, {s['learning_rate']:g}, betas {s['beta1']:g} and {s['beta2']:g}, eps {s['adam_eps']:g}, "
                           f"weight decay {s['weight_decay']:g}"),
             ("schedule", f"warmup {s['warmup_steps']:,} steps, linear decay over the last {s['decay_steps']:,}"),
             ("seed", s["seed"])]
    found += [("went on from", shown(s[key])) for key in ("branch_from", "init_from") if s[key]]
    log = os.path.join(os.path.dirname(os.path.abspath(path)), "log.jsonl")
    if path and os.path.isfile(log):
        with open(log, encoding="utf-8") as f:
            rows = [row for row in map(json.loads, f) if row["step"] == state["step"] and "val_mlm_loss" in row]
        found += [("validation loss", f"CLM {row['val_clm_loss']:.4f}, MLM {row['val_mlm_loss']:.4f} nats a target, masking "
                   f"{s['eval_mask_rate']:.0%}") for row in rows[-1:]]
    return found


def shown(source):
    """A path as one tells it others: without the folders of this machine."""
    return source if source.startswith("hf:") and not os.path.isdir(source[3:]) else "/".join(source.split(os.sep)[-2:])


def beginning(state):
    """The line about an imported model."""
    facts = state.get("imported")
    return [("begun from", shown(facts["source"]) + (f" at {facts['revision']}" if facts["revision"] else ""))] if facts else []


def auto_class(kind):
    """The AutoModel class that loads a class of transformers: EuroBertForMaskedLM -> AutoModelForMaskedLM."""
    return "AutoModel" + kind[kind.find("For"):] * ("For" in kind)


def how_to_load(auto):
    """Example code and what to mind."""
    code = [f"from transformers import AutoTokenizer, {auto}", 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            f'model = {auto}.from_pretrained("FOLDER")']
    notes = []
    if auto != "AutoModelForCausalLM":
        code += ["", "from sentence_transformers import SentenceTransformer",
                 'model = SentenceTransformer("FOLDER")    # mean over tokens, length 1',
                 'model.encode_query(["what is it?"]) @ model.encode_document(["a text", "another"]).T']
        notes.append("tokenizer.json closes texts with the end-of-text token. The same token pads: use the attention mask.")
    if auto == "AutoModelForMaskedLM":
        notes.append("It was not trained to embed: fine-tune it before you search with it.")
    return ["```python", *code, "```", "", *notes]
