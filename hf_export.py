"""A checkpoint -> a folder that transformers and sentence-transformers load, without code of ours and without unpickling.

An encoder leaves as `eurobert`, which is native in transformers 5 (AutoModel, ForMaskedLM, ForSequenceClassification and
ForTokenClassification load it) and is a SentenceTransformer as well: mean over the tokens, length 1, as eval_ir.py embeds.
A decoder leaves as `llama`. A fine-tuned encoder takes its head along.
"""
import json
import os
import shutil

from safetensors.torch import load_file, save_file

import checkpoint
import hf_model
import hf_tokenizer
from configurator import UserError
from files import table_cell
from objectives import hides, is_causal, kind_and_rate, objective_at
from retriever import DOCUMENT, QUERY


def export(ckpt, out, average=1, causal="auto"):
    """Write `out`, which must not be there. -> config.json's content, the steps whose checkpoints it is the mean of

    average: how many of the run's checkpoints up to this one. causal: "true" for a decoder, "false" for an encoder, "auto" as it
    was trained last. Raises UserError.
    """
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out} is there already: choose another folder")
    path = checkpoint.find(ckpt)
    state, config, tok = checkpoint.read_state(path), checkpoint.config_of(path), checkpoint.tokenizer_of(path)
    causal = was_causal(state) if causal == "auto" else causal == "true"
    paths = last_checkpoints(path, average)
    about = hf_model.write_config(config, causal) | {
        "bos_token_id": None, "eos_token_id": tok.eos_id, "pad_token_id": tok.eos_id, "mask_token_id": tok.mask_id,
        "classifier_pooling": "mean"}
    weights = hf_model.write_weights(mean_of(paths), config)
    if "fine_tuned" in state:
        if causal or was_causal(state):
            raise UserError(f"{path} is fine-tuned: it leaves as an encoder, if it was one; transformers has no decoder with "
                            "such a head")
        stored = os.path.join(path, "head.safetensors")
        head = load_file(stored) if os.path.isfile(stored) else {}
        # the LM head is left over from pretraining and fits no more
        weights = {k: v for k, v in weights.items() if k != "lm_head.weight"} | head
        about |= with_labels(state["fine_tuned"]) if head else {"architectures": ["EuroBertModel"]}
    files = {"config.json": about, "tokenizer.json": hf_tokenizer.to_json(tok, append_eos=not causal),
             "tokenizer_config.json": tokenizer_config(tok, config)} | ({} if causal else sentence_transformer(config))
    hf_tokenizer.compare(files["tokenizer.json"], tok, path)
    temporary = os.path.normpath(out) + ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    for name, content in files.items():
        os.makedirs(os.path.dirname(os.path.join(temporary, name)), exist_ok=True)
        with open(os.path.join(temporary, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2, ensure_ascii=False)
    stored = os.path.join(temporary, "model.safetensors")
    save_file(weights, stored, metadata={"format": "pt"})
    shutil.copymode(os.path.join(temporary, "config.json"), stored)         # safetensors writes for the owner alone
    with open(os.path.join(temporary, "README.md"), "w", encoding="utf-8") as f:
        f.write(model_card(path, paths, state, about, config, sum(v.numel() for v in weights.values())))
    os.replace(temporary, out)
    return about, [checkpoint.step_of(p) for p in paths]


def was_causal(state):
    """Under which mask a checkpoint was trained last. Raises UserError if its state does not tell."""
    if "fine_tuned" in state:
        return bool(state["fine_tuned"].get("causal"))
    if "phases" in state["settings"]:
        return is_causal(objective_at(max(0, state["step"] - 1), state["settings"]["phases"]))
    known = state.get("imported", {}).get("causal")
    if known is None:
        raise UserError("this checkpoint does not say whether it is a decoder or an encoder: --causal=true or --causal=false")
    return known


def last_checkpoints(path, k):
    """The paths of k checkpoints of a run, `path` the last of them. Raises UserError if there are fewer."""
    run = os.path.dirname(os.path.abspath(path))
    found = [p for p in checkpoint.all_of(run) if checkpoint.step_of(p) <= checkpoint.step_of(path)]
    if k < 1 or len(found) < k:
        raise UserError(f"average={k}: {run} has {len(found)} checkpoint{'s' * (len(found) > 1)} up to {os.path.basename(path)}; "
                        "--keep_last and --milestones of train.py keep more")
    for p in found[-k:-1]:
        checkpoint.same_model(checkpoint.config_of(checkpoint.find(p)), checkpoint.config_of(path), p)
    return found[-k:]


def mean_of(paths):
    """The mean of checkpoints' weights, added in fp64, as fp32."""
    weights = load_file(os.path.join(paths[-1], "model.safetensors"))
    if len(paths) > 1:
        total = {k: v.double() for k, v in weights.items()}
        for path in paths[:-1]:
            for k, v in load_file(os.path.join(path, "model.safetensors")).items():
                total[k] += v
        weights = {k: (v / len(paths)).float() for k, v in total.items()}
    return weights


def tokenizer_config(tok, config):
    """eos pads, as in pretraining, so the attention mask must say what is text."""
    specials = {i: text for text, i in tok.encoding._special_tokens.items()}
    mask = {"__type": "AddedToken", "content": specials[tok.mask_id], "lstrip": True, "rstrip": False, "normalized": False,
            "single_word": False, "special": True}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size, "eos_token": specials[tok.eos_id],
            "pad_token": specials[tok.eos_id], "mask_token": mask, "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"]}


def with_labels(row):
    """config.json's part about a fine-tuned head. Question answering has two outputs a token."""
    labels = row["labels"] or (("outside", "inside") if row["mode"] == "paper" else ("start", "end"))
    kind = "Sequence" if row["kind"] == "sequence" else "Token"
    return {"architectures": [f"EuroBertFor{kind}Classification"], "num_labels": len(labels),
            "id2label": {str(i): name for i, name in enumerate(labels)}, "label2id": {name: i for i, name in enumerate(labels)},
            **({"problem_type": "single_label_classification"} if kind == "Sequence" else {})}


def sentence_transformer(c):
    """The files that make it one. Their type names are those of sentence-transformers 2 to 5, which 6 reads as well."""
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    return {"modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                             for i, (path, kind) in enumerate(modules)],
            "1_Pooling/config.json": {"word_embedding_dimension": c.n_embd, "pooling_mode_cls_token": False,
                                      "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False,
                                      "pooling_mode_mean_sqrt_len_tokens": False, "include_prompt": True},
            "2_Normalize/config.json": {},
            "sentence_bert_config.json": {"max_seq_length": round(0.99 * c.block_size), "do_lower_case": False},
            "config_sentence_transformers.json": {"prompts": {"query": QUERY, "document": DOCUMENT}, "default_prompt_name": None,
                                                  "similarity_fn_name": "cosine"}}


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
    rates = [kind_and_rate(objective)[1] or s["mask_rate"] for objective, _ in s["phases"]]
    phases = ", then ".join(f"{n:,} steps {kind_and_rate(objective)[0].upper()}" + f" at {rate:.0%} masking" * hides(objective)
                            for (objective, n), rate in zip(s["phases"], rates))
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
