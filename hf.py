"""Import models from Hugging Face, and export checkpoints for it.

    python hf.py import HuggingFaceTB/SmolLM2-135M out/smollm2    # a model -> a run folder
    python hf.py import path/to/folder out/model                  # from config.json and safetensors
    python hf.py export runs/demo/clm_then_mlm out/model          # a run's newest checkpoint
    python hf.py export RUN/step_0042000 out/mean --average=5     # the mean of the five up to it
    python hf.py export STEP/trials/sst2/lr5e-05_sd0.encoder out/sst2       # kept by --keep=true

Import reads llama, mistral, qwen2, qwen3, eurobert, and the paper's own checkpoints (sl_model, whose
files we have not seen), without their remote code. It refuses, by name, what it does not know: a
tensor, a key of config.json, a tokenizer that is not a byte-level BPE. A model that was saved without
its LM head is for finetune.py and eval_ir.py only. train.py --init_from=hf:ORG/NAME imports a model by
itself.

Export writes safetensors, a tokenizer.json that gives our ids, and a model card with the facts of
the training. It refuses weights that hold NaN or infinity. One process at a time writes OUT.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import json
import shlex
from dataclasses import dataclass

from core.configurator import PositiveInt, UserError, nearest, run, shorten

USAGE = {"import": "hf.py import SOURCE OUT", "export": "hf.py export CKPT OUT"}


@dataclass
class Config:
    # import
    weights_only: bool = False      # import no tokenizer, e.g. of a Llama 2: the model reads ids only
    ignore: str = ""                # keys of config.json that change nothing, with commas between
    allow_bin: bool = False         # read a pytorch_model.bin, with the weights_only unpickler of torch
    # export
    average: PositiveInt = 1        # export the mean of this many checkpoints of the run
    causal: str = "auto"            # auto: as it was last trained; true: decoder; false: encoder
    args: tuple = ()


def main(c):
    if not c.args:
        raise UserError(f"what to do? {USAGE['import']}, or {USAGE['export']}")
    if c.args[0] not in USAGE:
        command = nearest(c.args[0], USAGE)
        raise UserError(f"unknown command {shorten(c.args[0])}; the nearest is {USAGE[command]}")
    if len(c.args) != 3:
        raise UserError(f"{c.args[0]} needs a source and a target: {USAGE[c.args[0]]}")
    if c.causal not in ("auto", "true", "false"):
        raise UserError(f"causal={c.causal}: expected auto, true or false")
    command, source, out = c.args
    if command == "import":
        import_model(c, source, out)
    else:
        export_model(c, source, out)


def import_model(c, source, out):
    """Import `source` as the run folder `out`, and print what to do with it."""
    # Imported here, so that an export does not load it.
    from huggingface import importing
    ignore = c.ignore.replace(" ", "").split(",")
    ignore = [key for key in ignore if key]
    imported, path = importing.write(source, out, c.weights_only, ignore, c.allow_bin)

    print(importing.describe(imported))
    print(f"written to {path}")
    if imported.tokenizer and not imported.facts.get("has_lm_head", True):
        print(f"to fine-tune it: {shlex.join(['python', 'finetune.py', f'--ckpt={out}'])}")
    elif imported.tokenizer:
        name = shlex.quote("hf:" + source.removeprefix("hf:"))
        prepare = f"python prepare_fineweb.py --source=FILES --out=DATA --tokenizer={name}"
        print(f"a corpus for it:     {prepare}")
        words = ["python", "train.py", f"--init_from={out}", "--data_dir=DATA", "--out_dir=RUN",
                 '--phases=[("mlm", 400)]']
        print(f"to train it further: {shlex.join(words)}")


def export_model(c, source, out):
    """Export the checkpoint `source` as the folder `out`, and print how to load it."""
    # Imported here, so that an import does not load it.
    from huggingface import exporting
    from huggingface.model_card import auto_class
    hub_config, steps = exporting.export(source, out, c.average, c.causal)
    architecture = hub_config["architectures"][0]
    folder = json.dumps(out, ensure_ascii=False)
    weights = f"step {steps[0]}"
    if len(steps) > 1:
        weights = f"mean of steps {', '.join(str(step) for step in steps)}"
    ways_to_load = [f"{auto_class(architecture)}.from_pretrained({folder})"]
    if hub_config["model_type"] == "eurobert":
        ways_to_load.append(f"SentenceTransformer({folder})")
    print(f"{architecture}, {weights}, in {out}: {', '.join(ways_to_load)}")


if __name__ == "__main__":
    run(main, Config)
