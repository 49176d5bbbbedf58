"""See what a checkpoint has learned: let it continue a prompt (causal mask), or fill the gaps of a
text (bidirectional mask).

    python sample.py --ckpt=runs/demo/clm --prompt="The state of the Union"
    python sample.py --ckpt=runs/demo/mlm --fill="We will [MASK] the war and keep the [MASK]."
    python sample.py --compare runs/demo/clm runs/demo/clm_then_mlm --fill="the [MASK] States"

The same weights do both, so --compare shows what the swap of objectives did: a model can fill gaps
after it, but not before. Without --prompt and --fill a model writes from the beginning of a
document. A model that was last trained on MLM also writes, with a note that names the last
checkpoint before it that was trained to write.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import os
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass

import torch
from tqdm import tqdm

from core import checkpoint
from core.configurator import (
    NonNegativeFloat,
    NonNegativeInt,
    Path,
    PositiveInt,
    Seed,
    UserError,
    run,
)
from core.device import pick_attention, pick_device
from core.schema import read_json
from huggingface.history import NO_HEAD, has_lm_head, was_causal

PARENT_SHAPE = {"parent": str}      # of a run's config.json: the checkpoint it began from, or ""


@dataclass
class Config:
    ckpt: Path = ""                      # RUN/step_NNNNNNN, or RUN for its newest checkpoint
    compare: tuple[Path, ...] = ()       # instead: several checkpoints, side by side
    prompt: str = ""                     # text to continue, under the causal mask
    fill: str = ""                       # text whose [MASK]s to fill, under the bidirectional mask
    max_new_tokens: PositiveInt = 100    # the longest continuation
    num_samples: PositiveInt = 1         # how many continuations
    temperature: NonNegativeFloat = 0.8  # 0: always the likeliest token
    top_k: NonNegativeInt = 200          # draw from this many of the likeliest tokens; 0: from all
    show: PositiveInt = 5                # candidates for each [MASK]
    seed: Seed = 1337                    # same seed, same text
    device: str = "auto"                 # cuda where there is a GPU, else cpu
    attention: str = "auto"              # triton or varlen (CUDA), sdpa (anywhere) or reference


@torch.inference_mode()
def generate(model, tok, prompt, c, device):
    """Return c.num_samples texts that continue the prompt, each up to eos or c.max_new_tokens.

    Every token takes a whole forward pass. A cache of keys and values would be more code than the
    rest of this file.
    """
    is_never_written = find_unwritable(model, tok, device)
    generator = torch.Generator(device).manual_seed(c.seed)
    start = tok.encode(prompt) or [tok.eos_id]      # a new document begins after an eos
    tokens = torch.tensor([start] * c.num_samples, device=device)           # [S, L]
    for _ in tqdm(range(c.max_new_tokens), desc="writing", leave=False, disable=None):
        # the model sees S sequences of equal length, laid end to end
        context = tokens[:, -model.config.block_size:]
        S, L = context.shape
        cu_seqlens = torch.arange(0, S * L + 1, L, dtype=torch.int32, device=device)
        last_positions = cu_seqlens[1:].long() - 1
        hidden = model(context.flatten(), cu_seqlens, True, last_positions)                 # [S, C]
        logits = model.logits(hidden).float().masked_fill(is_never_written, float("-inf"))  # [S, V]

        next_tokens = draw_tokens(logits, c.temperature, c.top_k, generator)                # [S, 1]
        tokens = torch.cat([tokens, next_tokens], dim=1)
        is_finished = (tokens[:, len(start):] == tok.eos_id).any(1)                         # [S]
        if is_finished.all():
            break

    # each text ends before its eos
    texts = []
    for ids in tokens[:, len(start):].tolist():
        if tok.eos_id in ids:
            ids = ids[:ids.index(tok.eos_id)]
        texts.append(tok.decode(ids))
    return texts


def find_unwritable(model, tok, device):
    """Return which ids must not be written: the mask, and ids without a token. -> [V] bool"""
    V = model.config.vocab_size
    is_never_written = torch.ones(V, dtype=torch.bool, device=device)
    writable = [i for i in tok.known_ids if i < V and i != tok.mask_id]
    is_never_written[writable] = False
    return is_never_written


def draw_tokens(logits, temperature, top_k, generator):
    """Draw a token for each row of logits [S, V]. -> ids [S, 1]"""
    if temperature < 1e-6:      # 0, or so little that logits / temperature would be infinite
        return logits.argmax(-1, keepdim=True)
    V = logits.shape[1]
    best, ids = logits.topk(min(top_k or V, V))
    p = (best / temperature).softmax(-1)
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))


@torch.inference_mode()
def fill(model, tok, text, show, device):
    """Return, for each [MASK] of the text, the `show` likeliest tokens as (token, probability).

    The probability is over the whole vocabulary. A [MASK] stands for a single token. A token
    includes the space before its word, so the space before [MASK] is removed.
    """
    mask_text = tok.encoding.decode([tok.mask_id])
    pieces = re.split(rf"\s*(?:\[MASK\]|{re.escape(mask_text)})", text)
    ids = tok.encode(pieces[0])
    for piece in pieces[1:]:
        ids += [tok.mask_id, *tok.encode(piece)]
    ids.append(tok.eos_id)      # closes the text, as in pretraining

    tokens = torch.tensor(ids, device=device)                               # [T]
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
    positions = (tokens == tok.mask_id).nonzero()[:, 0]                     # [N]
    hidden = model(tokens, cu_seqlens, False, positions)                    # [N, C]
    best = model.logits(hidden).float().softmax(-1).topk(show)              # [N, show]

    gaps = []
    for gap_ids, probabilities in zip(best.indices.tolist(), best.values.tolist()):
        candidates = [tok.decode([i]) or f"(id {i})" for i in gap_ids]
        gaps.append(list(zip(candidates, probabilities)))
    return gaps


def answer(c, path, device):
    """Return what a checkpoint answers: a text for each gap of --fill, or for each sample."""
    if not has_lm_head(checkpoint.read_state(path)):
        raise UserError(f"{path} cannot write or fill in: {NO_HEAD}, which predicts the tokens")
    tok = checkpoint.tokenizer_of(path)
    config = checkpoint.config_of(path)
    pick_attention(c.attention, device, "float32", config)      # raises if it cannot run here
    model = checkpoint.load_model(path, device, c.attention)
    if not c.fill:
        warn_if_not_causal(path)
        return [c.prompt + text for text in generate(model, tok, c.prompt, c, device)]
    gaps = fill(model, tok, c.fill, min(c.show, config.vocab_size), device)
    if not gaps:
        raise UserError(f"--fill={c.fill}: there is no [MASK] in it")
    texts = []
    for candidates in gaps:
        lines = [f"{p:7.2%}  {token.strip() or repr(token)}" for token, p in candidates]
        texts.append("\n".join(lines))
    return texts


def warn_if_not_causal(path):
    """Print a line if a checkpoint was last trained to fill gaps: what it writes means little."""
    if is_causal(path) is not False:
        return
    advice = "what it writes means little; --fill shows what it has learned"
    better = causal_checkpoint_before(path)
    if better:
        advice = f"--ckpt={better} was, and is the newest one before it"
    print(f"note: {path} was not last trained to continue texts: {advice}", file=sys.stderr)


def causal_checkpoint_before(path):
    """The newest earlier checkpoint, of the run or of one it comes from, that was trained to continue texts.

    As a rule it is the end of the CLM phase, which a run keeps. "" if there is none.
    """
    seen = set()
    while os.path.isdir(path) and os.path.realpath(path) not in seen:
        seen.add(os.path.realpath(path))
        run = os.path.dirname(os.path.normpath(path)) or "."
        for earlier in reversed(checkpoint.all_of(run)):
            if checkpoint.step_of(earlier) < checkpoint.step_of(path) and is_causal(earlier):
                return earlier
        # Continue with the checkpoint that the run began from.
        config_path = os.path.join(run, "config.json")
        path = read_json(config_path, PARENT_SHAPE)["parent"] if os.path.isfile(config_path) else ""
        if is_causal(path):
            return path
    return ""


def is_causal(path):
    """True if a checkpoint was last trained under the causal mask; None if that is not known."""
    try:
        return was_causal(checkpoint.read_state(path))
    except (UserError, OSError):
        return None


def print_side_by_side(names, texts):
    """Print a column for each name, with its text below it."""
    terminal = shutil.get_terminal_size().columns
    gaps_between = 3 * (len(names) - 1)
    width = max(20, (terminal - gaps_between) // len(names))
    # break each text into the lines of its column
    columns = []
    for name, text in zip(names, texts):
        lines = []
        for paragraph in [name, "-" * min(width, len(name)), *text.splitlines()]:
            lines += textwrap.wrap(paragraph, width) or [""]
        columns.append(lines)

    # print line by line, with blanks below the end of a short column
    for i in range(max(len(lines) for lines in columns)):
        cells = []
        for lines in columns:
            cell = lines[i] if i < len(lines) else ""
            cells.append(cell.ljust(width))
        print("   ".join(cells).rstrip())
    print()


def check_settings(c):
    """Raise UserError for settings that contradict each other or make no sense."""
    if bool(c.ckpt) == bool(c.compare):
        raise UserError("which checkpoint? --ckpt=RUN/step_NNNNNNN, or --compare A B to see "
                        "several side by side")
    if c.prompt and c.fill:
        raise UserError("--prompt continues a text and --fill fills the gaps of a text: give one "
                        "of them")
    if c.num_samples > 1000:
        raise UserError(f"num_samples={c.num_samples}: expected at most 1,000; another --seed gives "
                        "others")


def main(c):
    check_settings(c)
    device = pick_device(c.device)
    paths = [checkpoint.find(name) for name in c.compare or (c.ckpt,)]
    texts_of_checkpoint = [answer(c, path, device) for path in paths]

    # for the first gap or sample the texts of all checkpoints, then for the second, ...
    noun = "mask" if c.fill else "sample"
    for i, texts in enumerate(zip(*texts_of_checkpoint)):
        if len(texts_of_checkpoint[0]) > 1:
            print(f"{noun} {i + 1}")
        print_side_by_side(paths, texts)


if __name__ == "__main__":
    run(main, Config)
