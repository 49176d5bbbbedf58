"""config.json and tensor names of Hugging Face's Llama-style models, read and written.

llama, mistral, qwen2, qwen3, eurobert, and sl_model (the checkpoints of arXiv 2507.00994,
hf.co/MLMvsCLM, read without their remote code) are the same block with small differences: grouped
queries, the rotary base and Llama 3.1's scaling, a bias on q, k and v (Qwen2), a norm on q and k
(Qwen3). Whatever is not listed here stops the import or the export, by name, because a model that
is only almost the same computes something else.
"""

import dataclasses
import functools
import json
import math
import os

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from core.checkpoint import name_of_dtype
from core.configurator import UserError
from core.files import find_files
from core.schema import misfit
from huggingface.folders import read_model_json
from model import ModelConfig

# ---- config.json

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "eurobert", "sl_model")

# {field of ModelConfig: the key of config.json that holds it}; every config.json must have these.
NEEDED = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_ffn": "intermediate_size",
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
# The other fields of ModelConfig that write_config writes.
ALSO_WRITTEN = (
    "n_kv_head", "head_dim", "tied", "rope_theta", "rope_scaling", "qkv_bias", "qk_norm",
)
# No model has more of anything: a larger number is a typing error, and would only exhaust the memory.
MOST_LAYERS = 10_000
LARGEST_SIZE = 100_000_000
# The types of the settings that are read.
CONFIG_SHAPE = {
    "model_type?": object,
    **{f"{key}?": (int, None) for key in NEEDED.values()},
    "rms_norm_eps?": (float, None),
    "num_key_value_heads?": (int, None),
    "head_dim?": (int, None),
    "tie_word_embeddings?": (bool, None),
    "attention_bias?": (bool, None),
    "use_sliding_window?": (bool, None),
    "sliding_window?": (int, None),
    "rope_theta?": (float, None),
    "rope_scaling?": ({}, None),
    "rope_parameters?": ({}, None),
}
ROPE_SHAPE = {
    "rope_theta?": (float, None), "rope_type?": (str, None), "type?": (str, None),
    "partial_rotary_factor?": float,
}
# The keys of config.json that read_config reads.
READ = {
    *NEEDED.values(), "model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "quantization_config",
}
# Keys that do not change what the forward pass computes: dropout, heads, generation and files.
HARMLESS = {
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "mask_token_id", "sep_token_id", "cls_token_id", "bos_token", "eos_token", "pad_token",
    "unk_token", "mask_token", "sep_token", "cls_token", "torch_dtype", "dtype",
    "transformers_version", "transformers.js_config", "_name_or_path", "name_or_path",
    "_model_name_or_path", "use_cache", "initializer_range", "attention_dropout", "hidden_dropout",
    "pretraining_tp", "is_llama_config", "id2label", "label2id", "num_labels", "problem_type",
    "classifier_pooling", "clf_pooling", "return_dict", "output_attentions",
    "chunk_size_feed_forward", "task_specific_params", "is_decoder", "keys_to_ignore_at_inference",
    "_attn_implementation", "_attn_implementation_autoset",
}


def read_config(folder, ignore=()):
    """Read config.json. -> the ModelConfig, and the model_type, e.g. "llama"

    ignore: keys that the caller knows to be harmless. Raises UserError, naming every setting that
    our model does not compute.
    """
    config = read_model_json(folder, "config.json", CONFIG_SHAPE)
    path = os.path.join(folder, "config.json")
    kind = config.get("model_type")
    check_config(config, kind, path, ignore)
    theta, scaling = read_rope(config, kind, path)

    sizes = {field: config[key] for field, key in NEEDED.items()}
    has_bias = kind == "qwen2" or bool(config.get("attention_bias"))
    c = ModelConfig(
        **sizes,
        head_dim=config.get("head_dim") or 0,
        n_kv_head=config.get("num_key_value_heads") or config["num_attention_heads"],
        tied=bool(config.get("tie_word_embeddings")),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=has_bias,
        qk_norm=kind == "qwen3",
    )

    # A sliding window changes nothing in texts that fit into it.
    window = None
    if config.get("use_sliding_window", kind == "mistral"):
        window = config.get("sliding_window")
    if window and window < c.block_size:
        c.block_size = window
        print(
            f"its layers look back {window:,} tokens, ours to the beginning: the same up to "
            f"{window:,} tokens, which becomes its block_size"
        )
    check_heads(c, path)
    return c, kind


def check_heads(c, path):
    """Raises UserError if the heads that config.json describes cannot be made."""
    if not 1 <= c.n_kv_head <= c.n_head or c.n_head % c.n_kv_head:
        raise UserError(
            f"{path}: num_key_value_heads={c.n_kv_head}: expected a divisor of "
            f"num_attention_heads={c.n_head}"
        )
    if not 2 <= c.head_dim <= LARGEST_SIZE or c.head_dim % 2:
        raise UserError(f"{path}: heads of {c.head_dim} dimensions: expected an even number")


def check_config(config, kind, path, ignore):
    """Raises UserError if config.json lacks a setting, or has one that we do not compute."""
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{path}: model_type {kind} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    missing = [key for key in NEEDED.values() if config.get(key) is None]
    if missing:
        raise UserError(f"{path} does not say {', '.join(missing)}")
    for field, key in NEEDED.items():
        value = config[key]
        largest = MOST_LAYERS if field == "n_layer" else LARGEST_SIZE
        if field != "norm_eps" and not 1 <= value <= largest:
            raise UserError(f"{path}: {key}={value}: expected a whole number from 1 to {largest:,}")
    if not 0 < config["rms_norm_eps"] < 1:
        raise UserError(
            f"{path}: rms_norm_eps={config['rms_norm_eps']}: expected a number between 0 and 1"
        )
    if (config.get("sliding_window") or 0) < 0:
        raise UserError(f"{path}: sliding_window={config['sliding_window']}: expected a number above 0")
    if config.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config: the weights are quantized; fetch the original, or "
            "dequantize them with transformers"
        )
    accepted = READ | HARMLESS | {*ignore}
    unknown = [
        key for key, value in config.items() if key not in accepted and value not in (None, False)
    ]
    if unknown:
        settings = " ".join(", ".join(f"{key}={config[key]}" for key in unknown).split())
        if len(settings) > 300:
            settings = f"{settings[:300]}..."
        raise UserError(
            f"{path}: {settings}: not known here, and may change what the model computes; "
            f"if it does not: hf.py import --ignore={','.join(unknown)}"
        )
    for key, our_value in (("hidden_act", "silu"), ("mlp_bias", False)):
        if config.get(key, our_value) != our_value:
            raise UserError(f"{path}: {key}={config[key]}: this model has {our_value}")


def read_rope(config, kind, path):
    """Return rope_theta, and Llama 3.1's rope_scaling or None. Raises UserError for other kinds."""
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    rope = config.get("rope_parameters")
    if not rope:
        rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    problem = misfit(rope, ROPE_SHAPE, "rope_parameters")
    if problem:
        raise UserError(f"{path}: {problem}")
    theta = rope.get("rope_theta") or config.get("rope_theta")
    if not theta and kind in ("llama", "mistral"):
        theta = 10_000.0  # the first Llamas all had this one, so their configs do not say it
    if not theta:
        raise UserError(f"{path} does not say rope_theta")
    if not 0 < theta < math.inf:
        raise UserError(f"{path}: rope_theta={theta}: expected a number above 0")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    rotated_share = rope.get("partial_rotary_factor", 1)
    if rope_type not in ("default", "llama3") or rotated_share != 1:
        raise UserError(
            f"{path}: rope type {rope_type}, partial_rotary_factor {rotated_share}: rotary "
            "positions as in Llama, and scaled as in Llama 3.1, are supported"
        )
    if rope_type == "default":
        return float(theta), None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {}
    for key in keys:
        value = rope.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{path}: {key}={value} of its rope type llama3: expected a number above 0")
        scaling[key] = value
    if scaling["low_freq_factor"] == scaling["high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor and high_freq_factor are equal: expected two numbers")
    return float(theta), scaling


def write_config(c, causal):
    """Return what config.json says about the model: a native eurobert, or a decoder if causal.

    Raises UserError for a model that Hugging Face has no class for.
    """
    check_can_be_written(c, causal)
    if not causal:
        kind, architecture = "eurobert", "EuroBertForMaskedLM"
    elif c.qk_norm:
        kind, architecture = "qwen3", "Qwen3ForCausalLM"
    else:
        kind, architecture = "llama", "LlamaForCausalLM"
    scaling = {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None
    sizes = {key: getattr(c, field) for field, key in NEEDED.items()}
    return {
        "model_type": kind,
        "architectures": [architecture],
        **sizes,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_bias": c.qkv_bias,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
        # transformers 5 reads rope_parameters, transformers 4 rope_theta and rope_scaling. Without
        # them the base becomes 10,000, and nothing warns.
        "rope_parameters": {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
    }


def check_can_be_written(c, causal):
    """Raises UserError if config.json has no way to say what this ModelConfig says."""
    if c.qk_norm and not causal:
        raise UserError(
            "Hugging Face has no native encoder with norms on q and k (Qwen3's): "
            "--causal=true exports the decoder"
        )
    if c.n_embd % c.n_head and not c.qk_norm:
        raise UserError(
            f"Hugging Face needs a width ({c.n_embd}) that is a multiple of its heads ({c.n_head})"
        )
    # A field that a fork added, and that does not have its default.
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if field.name not in (*NEEDED, *ALSO_WRITTEN) and value != field.default:
            raise UserError(
                f"the export does not know ModelConfig.{field.name}={value}: add it to "
                "write_config() in huggingface/weights.py"
            )


# ---- tensors

INDEX_SHAPE = {"weight_map": {str: str}}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def names(c):
    """Return {our tensor: [(Hugging Face's tensor, its shape), ...]}.

    Their tensors, stacked in this order, make ours. At a tensor that is not listed here, the import
    and the export stop and name it.
    """
    q_rows = c.n_head * c.head_dim
    kv_rows = c.n_kv_head * c.head_dim
    norm = (c.n_embd,)
    vocabulary = (c.vocab_size, c.n_embd)

    table = {
        "embedding.weight": [("model.embed_tokens.weight", vocabulary)],
        "norm.weight": [("model.norm.weight", norm)],
    }
    for i in range(c.n_layer):
        block = f"blocks.{i}"
        layer = f"model.layers.{i}"
        table |= {
            f"{block}.norm_1.weight": [(f"{layer}.input_layernorm.weight", norm)],
            f"{block}.norm_2.weight": [(f"{layer}.post_attention_layernorm.weight", norm)],
            f"{block}.attention.out.weight": [
                (f"{layer}.self_attn.o_proj.weight", (c.n_embd, q_rows))
            ],
            f"{block}.mlp.gate_up.weight": [
                (f"{layer}.mlp.gate_proj.weight", (c.n_ffn, c.n_embd)),
                (f"{layer}.mlp.up_proj.weight", (c.n_ffn, c.n_embd)),
            ],
            f"{block}.mlp.down.weight": [(f"{layer}.mlp.down_proj.weight", (c.n_embd, c.n_ffn))],
            f"{block}.attention.qkv.weight": [
                (f"{layer}.self_attn.q_proj.weight", (q_rows, c.n_embd)),
                (f"{layer}.self_attn.k_proj.weight", (kv_rows, c.n_embd)),
                (f"{layer}.self_attn.v_proj.weight", (kv_rows, c.n_embd)),
            ],
        }
        if c.qkv_bias:
            table[f"{block}.attention.qkv.bias"] = [
                (f"{layer}.self_attn.q_proj.bias", (q_rows,)),
                (f"{layer}.self_attn.k_proj.bias", (kv_rows,)),
                (f"{layer}.self_attn.v_proj.bias", (kv_rows,)),
            ]
        if c.qk_norm:
            table |= {
                f"{block}.attention.q_norm.weight": [
                    (f"{layer}.self_attn.q_norm.weight", (c.head_dim,))
                ],
                f"{block}.attention.k_norm.weight": [
                    (f"{layer}.self_attn.k_norm.weight", (c.head_dim,))
                ],
            }
    if not c.tied:
        table["lm_head.weight"] = [("lm_head.weight", vocabulary)]
    return table


def list_names(tensors):
    """Return names for a message: "a, b, c and 4 more"."""
    tensors = sorted(tensors)
    text = ", ".join(tensors[:3])
    if len(tensors) > 3:
        text += f" and {len(tensors) - 3} more"
    return text


def tensor_files(folder, allow_bin):
    """Return the names of the files with a folder's weights. Raises UserError if one is missing.

    allow_bin: take pytorch_model.bin if there are no safetensors files.
    """
    files = list_files(folder, "model.safetensors")
    bin_files = list_files(folder, "pytorch_model.bin")
    has_safetensors = files != ["model.safetensors"] or os.path.isfile(os.path.join(folder, files[0]))
    has_bin = all(os.path.isfile(os.path.join(folder, name)) for name in bin_files)
    if allow_bin and has_bin and not has_safetensors:
        return bin_files
    missing = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
    pickled = []
    for kind in ("bin", "pth", "pt"):
        pickled += [os.path.basename(path) for path in find_files(folder, f"*.{kind}")]
    if missing == ["model.safetensors"] and pickled:
        raise UserError(
            f"{folder} holds only pickled weights ({min(pickled)}): hf.py import --allow_bin=true "
            "reads a pytorch_model.bin with torch's restricted unpickler; or, if you trust it, convert "
            "it: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    if missing:
        hint = ""
        if missing == ["model.safetensors"] and not allow_bin:
            hint = "; if the model has only a pytorch_model.bin: hf.py import --allow_bin=true"
        raise UserError(
            f"{folder} has no {', '.join(missing)}: it is not complete, fetch it again{hint}"
        )
    return files


def list_files(folder, name):
    """Return the names of the files that hold a model's weights: `name`, or those that its index lists."""
    index = f"{name}.index.json"
    if not os.path.isfile(os.path.join(folder, index)):
        return [name]
    file_of_tensor = read_model_json(folder, index, INDEX_SHAPE)["weight_map"]
    extension = os.path.splitext(name)[1]
    for tensor, file in file_of_tensor.items():
        if os.path.basename(file) != file or not file.endswith(extension):
            raise UserError(
                f"{folder}/{index}: {tensor} lies in {file!r}, which is not a {extension} file of "
                "this folder"
            )
    return sorted(set(file_of_tensor.values())) or [name]


def find_tensors(folder, allow_bin):
    """Return each tensor of a folder: {name: a function that reads it}.

    Models without a head are saved without "model." before the names. Here all names have it.
    Raises UserError if a file is missing or damaged, or if two tensors have the same name.
    """
    readers = {}
    for file in tensor_files(folder, allow_bin):
        path = os.path.join(folder, file)
        tensors = open_bin(path) if file.endswith(".bin") else open_safetensors(path)
        for stored, read in tensors.items():
            if stored.endswith("rotary_emb.inv_freq"):
                continue  # frequencies in old Llama files, which follow from rope_theta
            has_prefix = stored.startswith(("model.", "lm_head."))
            name = stored if has_prefix else f"model.{stored}"
            if name in readers:
                raise UserError(f"{folder} has two tensors {name}: which of them is the model's?")
            readers[name] = read
    return readers


def open_safetensors(path):
    """Return {name: a function that reads the tensor} of a safetensors file. Raises UserError."""
    try:
        check_header(path)
        file = safe_open(path, "pt")
        return {name: functools.partial(file.get_tensor, name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not complete ({reason}): fetch it again") from None


def check_header(path):
    """Raises ValueError if the header of a safetensors file has a name twice: safe_open takes the last."""
    def check_pairs(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError("a name stands twice in its header")
        return dict(pairs)

    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > os.path.getsize(path):
            raise ValueError("its header is cut off")
        try:
            json.loads(f.read(length), object_pairs_hook=check_pairs)
        except RecursionError:
            raise ValueError("its header is nested too deep") from None


def open_bin(path):
    """Return {name: a function that reads the tensor} of a pytorch_model.bin. Raises UserError.

    torch's restricted unpickler makes tensors and containers, and runs nothing that a file says.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip files, of pickles and of torch
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a file of tensors only, or is damaged ({reason})") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds a {type(tensors).__name__}, not tensors by name")
    readers = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path} holds more than tensors by name ({str(name)[:60]!r})")
        readers[name] = value.detach
    return readers


def check_names(folder, c, present, expected):
    """Raises UserError if a folder lacks tensors, or has tensors that are not known here.

    present: the names of its tensors; expected: the names that Encoder(c) needs.
    -> extra tensors that are accepted if their values change nothing: a second copy of a tied head,
    and a bias of zeros on the attention's output, which our own export of a model with Qwen2's
    biases writes
    """
    if "lm_head.weight" not in present:
        expected = expected - {"lm_head.weight"}
    extra = set()
    for name in present - expected:
        is_copy_of_head = c.tied and name == "lm_head.weight"
        is_output_bias = c.qkv_bias and name.endswith("self_attn.o_proj.bias")
        if is_copy_of_head or is_output_bias:
            extra.add(name)

    unknown = present - expected - extra
    if unknown:
        raise UserError(f"{folder} has tensors that are not known here: {list_names(unknown)}")
    missing = expected - present
    if missing:
        raise UserError(f"{folder} lacks: {list_names(missing)}")
    return extra


def read_weights(folder, c, allow_bin=False):
    """Return the tensors of a folder as Encoder(c)'s state dict, in fp32.

    allow_bin: take pytorch_model.bin if there are no safetensors files. A model that was saved
    without its LM head has no lm_head.weight here, whatever c says. Raises UserError, by name, for
    tensors that are unknown, missing, or of another shape or type, or that hold NaN or infinity.
    """
    readers = find_tensors(folder, allow_bin)
    table = names(c)
    shapes = {}
    for pieces in table.values():
        shapes |= dict(pieces)

    extra = check_names(folder, c, readers.keys(), shapes.keys())
    if "lm_head.weight" not in readers:
        table.pop("lm_head.weight", None)

    def read(name):
        value = readers[name]()
        if value.dtype not in DTYPES:
            raise UserError(
                f"{folder}: {name} holds {name_of_dtype(value)}, not floating-point numbers of 16 bits "
                "or more: fetch the model with weights that are not quantized"
            )
        value = value.float()
        if not torch.isfinite(value).all():
            raise UserError(f"{folder}: {name} holds NaN or infinity: the model is damaged")
        return value

    # Stack Hugging Face's tensors to ours.
    weights = {}
    bar = tqdm(table.items(), desc="reading weights", unit="tensor", leave=False, disable=None)
    for our_name, pieces in bar:
        values = []
        for name, shape in pieces:
            value = read(name)
            if value.shape != shape:
                raise UserError(
                    f"{folder}: {name} has the shape {list(value.shape)}, and config.json needs "
                    f"{list(shape)}"
                )
            values.append(value)
        weights[our_name] = torch.cat(values)

    # Check that the extra tensors change nothing.
    for name in sorted(extra):
        if name == "lm_head.weight":
            if not torch.equal(read(name), weights["embedding.weight"]):
                raise UserError(
                    f"{folder}: lm_head.weight is not the embedding, and config.json says they "
                    "are tied"
                )
        elif read(name).any():
            raise UserError(f"{folder}: {name} is not zero, and this model has no such bias")
    return weights


def write_weights(weights, c):
    """Return the state dict of Encoder(c) under Hugging Face's names, cut into their tensors.

    Raises UserError, by name, for tensors that a fork added to the model, took away or reshaped.
    """
    table = names(c)
    unknown = weights.keys() - table.keys()
    if c.tied:
        unknown.discard("lm_head.weight")  # the same tensor as the embedding
    if unknown:
        raise UserError(
            "this checkpoint has tensors that the export does not know: "
            f"{list_names(unknown)}; add them to names() in huggingface/weights.py"
        )
    missing = table.keys() - weights.keys()
    if missing:
        raise UserError(
            f"this checkpoint lacks tensors that the export needs: {list_names(missing)}; "
            "change names() in huggingface/weights.py"
        )

    hub_weights = {}
    for our_name, pieces in table.items():
        rows = [shape[0] for _, shape in pieces]
        expected = [sum(rows), *pieces[0][1][1:]]
        if list(weights[our_name].shape) != expected:
            raise UserError(
                f"{our_name} has the shape {list(weights[our_name].shape)}, and the export expects "
                f"{expected}: change names() in huggingface/weights.py"
            )
        for (name, _), value in zip(pieces, weights[our_name].split(rows)):
            hub_weights[name] = value.contiguous()
    if c.qkv_bias:
        # Hugging Face's eurobert and llama then have a bias on the attention's output as well
        for i in range(c.n_layer):
            hub_weights[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(c.n_embd)
    return hub_weights
