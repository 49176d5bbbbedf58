"""config.json and tensor names of Hugging Face's Llama-style models, read into ours and written from ours.

llama, mistral, qwen2, qwen3, eurobert, and sl_model (the checkpoints of arXiv 2507.00994, hf.co/MLMvsCLM, read without their
remote code) are one block with small differences: grouped queries, the rotary base and Llama 3.1's scaling, a bias on q, k and
v (Qwen2), a norm on q and k (Qwen3). What is not known here is refused by name: a model that is almost the same computes
something else.
"""
import os

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from core.configurator import UserError
from core.files import find_files
from huggingface.tokenizer import read_json
from model import ModelConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "eurobert", "sl_model")
NEEDED = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size", "n_ffn": "intermediate_size",
          "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "norm_eps": "rms_norm_eps"}
READ = {*NEEDED.values(), "model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta", "rope_scaling",
        "rope_parameters", "hidden_act", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers",
        "layer_types", "quantization_config"}
# keys that say nothing about what the forward pass computes, or concern dropout, heads, generation and files
HARMLESS = {"architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id",
            "sep_token_id", "cls_token_id", "bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token",
            "cls_token", "torch_dtype", "dtype", "transformers_version", "transformers.js_config", "_name_or_path",
            "name_or_path", "_model_name_or_path", "use_cache", "initializer_range", "attention_dropout", "hidden_dropout",
            "pretraining_tp", "is_llama_config", "id2label", "label2id", "num_labels", "problem_type", "classifier_pooling",
            "clf_pooling", "return_dict", "output_attentions", "chunk_size_feed_forward", "task_specific_params", "is_decoder",
            "keys_to_ignore_at_inference", "_attn_implementation", "_attn_implementation_autoset"}


def read_config(folder, ignore=()):
    """config.json -> ModelConfig, model_type. ignore: keys to take as harmless. Raises UserError, naming what we do not compute."""
    d = read_json(folder, "config.json")
    kind, name = d.get("model_type"), os.path.join(folder, "config.json")
    if kind not in ARCHITECTURES:
        raise UserError(f"{name}: model_type {kind} is not supported; supported are {', '.join(ARCHITECTURES)}")
    lacking = [key for key in NEEDED.values() if d.get(key) is None]
    if lacking:
        raise UserError(f"{name} does not say {', '.join(lacking)}")
    if d.get("quantization_config"):
        raise UserError(f"{name}: quantization_config: the weights are quantized; fetch the original, or dequantize them with "
                        "transformers")
    unknown = [key for key, value in d.items() if key not in READ | HARMLESS | {*ignore} and value not in (None, False)]
    if unknown:
        raise UserError(f"{name}: " + ", ".join(f"{key}={d[key]}" for key in unknown) + ": not known here, and may change what the "
                        f"model computes; if it does not: hf.py import --ignore={','.join(unknown)}")
    for key, ours in (("hidden_act", "silu"), ("mlp_bias", False)):
        if d.get(key, ours) != ours:
            raise UserError(f"{name}: {key}={d[key]}: this model has {ours}")
    theta, scaling = rope(d, kind, name)
    c = ModelConfig(**{ours: d[theirs] for ours, theirs in NEEDED.items()}, head_dim=d.get("head_dim") or 0,
                    n_kv_head=d.get("num_key_value_heads") or d["num_attention_heads"], tied=bool(d.get("tie_word_embeddings")),
                    rope_theta=theta, rope_scaling=scaling, qkv_bias=kind == "qwen2" or bool(d.get("attention_bias")),
                    qk_norm=kind == "qwen3")
    window = d.get("sliding_window") if d.get("use_sliding_window", kind == "mistral") else None
    if window and window < c.block_size:
        c.block_size = window        # up to there a sliding window is none
        print(f"its layers look back {window:,} tokens, ours to the beginning: the same up to {window:,}, its block_size here")
    return c, kind


def rope(d, kind, name):
    """-> theta, scaling, from transformers 5's rope_parameters or from rope_theta and rope_scaling. Raises UserError."""
    found = d.get("rope_parameters") or {"rope_theta": d.get("rope_theta"), **(d.get("rope_scaling") or {})}
    theta, kind_of = found.get("rope_theta") or d.get("rope_theta"), found.get("rope_type") or found.get("type") or "default"
    if not theta and kind in ("llama", "mistral"):
        theta = 10_000.0             # configs from before there was a choice
    if not theta:
        raise UserError(f"{name} does not say rope_theta")
    part = found.get("partial_rotary_factor", 1)
    if kind_of not in ("default", "llama3") or part != 1:
        raise UserError(f"{name}: rope type {kind_of}, partial_rotary_factor {part}: rotary positions as in Llama, and scaled as "
                        "in Llama 3.1, are supported")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return float(theta), {key: found[key] for key in keys} if kind_of == "llama3" else None


def write_config(c, causal):
    """ModelConfig -> what config.json says of the model: of a native eurobert, or of a decoder. Raises UserError."""
    if c.qk_norm and not causal:
        raise UserError("Hugging Face has no native encoder with norms on q and k (Qwen3's): --causal=true exports the decoder")
    if c.n_embd % c.n_head and not c.qk_norm:
        raise UserError(f"Hugging Face wants a width ({c.n_embd}) that is a multiple of its heads ({c.n_head})")
    kind, base = ("qwen3" if c.qk_norm else "llama", "CausalLM") if causal else ("eurobert", "MaskedLM")
    scaling = {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None
    classes = {"llama": "Llama", "qwen3": "Qwen3", "eurobert": "EuroBert"}
    return {"model_type": kind, "architectures": [f"{classes[kind]}For{base}"],
            **{theirs: getattr(c, ours) for ours, theirs in NEEDED.items()},
            "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "tie_word_embeddings": c.tied, "hidden_act": "silu",
            "attention_bias": c.qkv_bias, "mlp_bias": False, "attention_dropout": 0.0,
            "initializer_range": 0.02, "dtype": "float32",
            # transformers 5 reads the first, 4 the other two; with none of them the base silently is 10,000
            "rope_parameters": {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})},
            "rope_theta": c.rope_theta, "rope_scaling": scaling}


# ---- weights

def names(c):
    """{our name: [(Hugging Face's name, rows of it), ...]}: their tensors, one below the other, are ours."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    found = {"embedding.weight": [("embed_tokens.weight", c.vocab_size)], "norm.weight": [("norm.weight", c.n_embd)]}
    for i in range(c.n_layer):
        ours, theirs = f"blocks.{i}.", f"layers.{i}."
        of_layer = {"norm_1.weight": [("input_layernorm.weight", c.n_embd)],
                    "norm_2.weight": [("post_attention_layernorm.weight", c.n_embd)],
                    "attention.out.weight": [("self_attn.o_proj.weight", c.n_embd)],
                    "mlp.gate_up.weight": [("mlp.gate_proj.weight", c.n_ffn), ("mlp.up_proj.weight", c.n_ffn)],
                    "mlp.down.weight": [("mlp.down_proj.weight", c.n_embd)]}
        for kind in ["weight"] + ["bias"] * c.qkv_bias:
            of_layer[f"attention.qkv.{kind}"] = [(f"self_attn.{x}_proj.{kind}", n) for x, n in (("q", q), ("k", kv), ("v", kv))]
        if c.qk_norm:
            of_layer |= {f"attention.{x}_norm.weight": [(f"self_attn.{x}_norm.weight", c.head_dim)] for x in "qk"}
        found |= {ours + name: [(theirs + part, n) for part, n in parts] for name, parts in of_layer.items()}
    found = {name: [(f"model.{part}", n) for part, n in parts] for name, parts in found.items()}
    return found if c.tied else found | {"lm_head.weight": [("lm_head.weight", c.vocab_size)]}


def columns(c, name):
    """What follows the rows in the shape of our tensor `name`."""
    if "norm" in name or name.endswith("bias"):
        return []
    return [c.n_head * c.head_dim if name.endswith("out.weight") else c.n_ffn if name.endswith("down.weight") else c.n_embd]


def find_tensors(folder):
    """{tensor's name, with "model." before it: (file, name there)} of a folder. Raises UserError if it is not whole."""
    index, files = "model.safetensors.index.json", ["model.safetensors"]
    if os.path.isfile(os.path.join(folder, index)):
        files = sorted(set(read_json(folder, index).get("weight_map", {}).values()))
    absent = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
    pickled = [os.path.basename(path) for kind in ("bin", "pth", "pt") for path in find_files(folder, f"*.{kind}")]
    if absent == ["model.safetensors"] and pickled:
        raise UserError(f"{folder} holds only pickled weights ({min(pickled)}), and unpickling runs whatever a file says: if you "
                        "trust it, convert it with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)")
    if absent:
        raise UserError(f"{folder} has no {', '.join(absent)}: it is not whole, fetch it again")
    found = {}
    for file in files:
        try:
            with safe_open(os.path.join(folder, file), "pt") as f:
                found |= {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": (file, name) for name in f.keys()
                          if not name.endswith("rotary_emb.inv_freq")}      # old Llama files carry what theta says
        except SafetensorError as error:
            raise UserError(f"{folder}/{file} is damaged or not whole ({error}): fetch it again") from None
    return found


def read_weights(folder, c):
    """The tensors of a folder as Encoder(c)'s state dict, fp32. Raises UserError for unknown, missing and misshapen ones."""
    found, wanted = find_tensors(folder), names(c)
    known = {part for parts in wanted.values() for part, _ in parts}
    # a bias of zeros on the attention's output (our own export of Qwen2's kind has it) and a second copy of a tied head are let by
    let_by = {n for n in found if c.qkv_bias and n.endswith("self_attn.o_proj.bias") or c.tied and n == "lm_head.weight"}
    unknown = found.keys() - known - let_by
    for problem, tensors in (("has tensors that are not known here", unknown), ("lacks", known - found.keys())):
        if tensors:
            some = sorted(tensors)
            hint = "; it was saved without its LM head: save AutoModelForMaskedLM or AutoModelForCausalLM"
            raise UserError(f"{folder} {problem}: {', '.join(some[:3])}{f' and {len(some) - 3} more' * (len(some) > 3)}"
                            + hint * ((problem, some) == ("lacks", ["lm_head.weight"])))
    files = {file: safe_open(os.path.join(folder, file), "pt") for file in {file for file, _ in found.values()}}

    def tensor(name):
        file, there = found[name]
        return files[file].get_tensor(there).float()

    def part(ours, name, rows):
        value = tensor(name)
        if list(value.shape) != [rows, *columns(c, ours)]:
            raise UserError(f"{folder}: {name} has the shape {list(value.shape)}, and config.json wants "
                            f"{[rows, *columns(c, ours)]}")
        return value

    bar = tqdm(wanted.items(), desc="reading weights", unit="tensor", leave=False, disable=None)
    weights = {ours: torch.cat([part(ours, *p) for p in parts]) for ours, parts in bar}
    for name in sorted(let_by):
        if name == "lm_head.weight" and not torch.equal(tensor(name), weights["embedding.weight"]):
            raise UserError(f"{folder}: lm_head.weight is not the embedding, and config.json says they are tied")
        if name != "lm_head.weight" and tensor(name).any():
            raise UserError(f"{folder}: {name} is not zero, and this model has no such bias")
    return weights


def write_weights(weights, c):
    """The state dict of Encoder(c) under Hugging Face's names, cut into their tensors."""
    found = {}
    for ours, parts in names(c).items():
        for (theirs, _), value in zip(parts, weights[ours].split([rows for _, rows in parts])):
            found[theirs] = value.contiguous()
    if c.qkv_bias:      # eurobert and llama have one on the attention's output as well
        found |= {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(c.n_embd) for i in range(c.n_layer)}
    return found
