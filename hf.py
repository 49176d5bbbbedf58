"""Hugging Face in and out.

    python hf.py import HuggingFaceTB/SmolLM2-135M out/smollm2          # a decoder or encoder -> a run folder with a checkpoint
    python hf.py import path/to/folder out/it                           # the same from a folder with config.json and safetensors
    python hf.py export runs/demo/clm_then_mlm exported/it              # a run's newest checkpoint -> a folder for everybody
    python hf.py export RUN/step_0042000 exported/it --average=5        # ... the mean of the five up to that one
    python hf.py export STEP/trials/sst2/lr5e-05_sd0.encoder exported/sst2    # what --keep=true of finetune.py or eval_ir.py kept

Imported are llama, mistral, qwen2, qwen3, eurobert, and the paper's own checkpoints (sl_model) without their remote code; whatever
is not known, a tensor, a config key, a tokenizer that is no byte-level BPE, is refused by name. train.py --init_from=hf:ORG/NAME
imports by itself. Exported are safetensors, a tokenizer.json with our ids, and a model card with the facts of the training.
"""
import json
import shlex
from dataclasses import dataclass

from core.configurator import UserError, run
from huggingface import exporting, importing
from huggingface.model_card import auto_class


@dataclass
class Config:
    # import
    weights_only: bool = False      # without the tokenizer, say of a Llama 2: nothing here can write text for it then
    ignore: str = ""                # keys of config.json, with commas between them, that you know change nothing
    # export
    average: int = 1                # the mean of so many checkpoints of the run
    causal: str = "auto"            # auto: as it was trained last; true: a decoder (llama); false: an encoder (eurobert)
    args: tuple = ()


def main(c):
    if len(c.args) != 3 or c.args[0] not in ("import", "export"):
        raise UserError("what to do? hf.py import SOURCE OUT, or hf.py export CKPT OUT")
    if c.causal not in ("auto", "true", "false"):
        raise UserError(f"causal={c.causal}: expected auto, true or false")
    what, source, out = c.args
    if what == "import":
        found, path = importing.write(source, out, c.weights_only, tuple(filter(None, c.ignore.replace(" ", "").split(","))))
        print(f"{importing.describe(found)}\nwritten to {path}")
        if found.tokenizer:
            name = shlex.quote("hf:" + source.removeprefix("hf:"))
            print(f"a corpus for it:  python prepare_fineweb.py --source=FILES --out=DATA --tokenizer={name}")
            words = ["python", "train.py", f"--init_from={out}", "--data_dir=DATA", "--out_dir=RUN", '--phases=[("mlm", 400)]']
            print(f"to go on from it: {shlex.join(words)}")
    else:
        about, steps = exporting.export(source, out, c.average, c.causal)
        kind, folder = about["architectures"][0], json.dumps(out, ensure_ascii=False)
        print(f"{kind}, {'mean of steps' if len(steps) > 1 else 'step'} {', '.join(map(str, steps))}, in {out}: "
              f"{auto_class(kind)}.from_pretrained({folder})"
              + f", SentenceTransformer({folder})" * (about["model_type"] == "eurobert"))


if __name__ == "__main__":
    run(main, Config)
