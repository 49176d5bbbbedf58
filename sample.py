"""What a checkpoint says: text that goes on from a prompt (causal mask), or words for the gaps of one (bidirectional mask).

    python sample.py --ckpt=runs/demo/clm --prompt="The state of the Union"
    python sample.py --ckpt=runs/demo/mlm --fill="We will [MASK] the war and keep the [MASK]."
    python sample.py --compare runs/demo/clm/step_0000200 runs/demo/clm_then_mlm --fill="the Congress of the [MASK] States"

The same weights do both, so --compare shows what the swap of objectives did: before it a model writes but cannot fill, after it, it
can. Without --prompt and --fill it writes from the beginning of a document.
"""
import re
import shutil
import textwrap
from dataclasses import dataclass

import torch
from tqdm import tqdm

from core import checkpoint
from core.configurator import UserError, run
from core.device import pick_attention, pick_device


@dataclass
class Config:
    ckpt: str = ""              # RUN/step_NNNNNNN, or RUN for its newest one
    compare: tuple = ()         # several of them instead, side by side
    prompt: str = ""            # text to go on from, under the causal mask
    fill: str = ""              # text whose every [MASK] is to be filled, under the bidirectional mask
    max_new_tokens: int = 100   # how far to go on
    num_samples: int = 1        # how many times
    temperature: float = 0.8    # 0: always the likeliest token
    top_k: int = 200            # choose among so many likeliest tokens; 0: among all
    show: int = 5               # candidates for each [MASK]
    seed: int = 1337            # same seed, same text
    device: str = "auto"        # cuda where there is one, else cpu
    attention: str = "auto"     # triton or varlen (CUDA), sdpa (anywhere) or reference


@torch.inference_mode()
def generate(model, tok, prompt, c, device):
    """-> num_samples texts that go on from prompt, each until eos or max_new_tokens.

    Every token is a whole forward pass: no cache of keys and values, which would be more code than the rest of this file.
    """
    unheard = torch.ones(model.config.vocab_size, dtype=torch.bool, device=device)
    unheard[[i for i in tok.known_ids if i < len(unheard) and i != tok.mask_id]] = False            # rows that stand for nothing
    chance = torch.Generator(device).manual_seed(c.seed)
    start = tok.encode(prompt) or [tok.eos_id]             # behind an eos a new document begins
    tokens = torch.tensor([start] * c.num_samples, device=device)                               # [S, L]
    for _ in tqdm(range(c.max_new_tokens), desc="writing", leave=False, disable=None):
        seen = tokens[:, -model.config.block_size:]
        cu_seqlens = torch.arange(0, seen.numel() + 1, seen.shape[1], dtype=torch.int32, device=device)
        hidden = model(seen.flatten(), cu_seqlens, True, cu_seqlens[1:].long() - 1)             # [S, C]
        logits = model.logits(hidden).float().masked_fill(unheard, float("-inf"))               # [S, V]
        if c.temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            best, ids = logits.topk(min(c.top_k or logits.shape[1], logits.shape[1]))
            new = ids.gather(1, torch.multinomial((best / c.temperature).softmax(-1), 1, generator=chance))
        tokens = torch.cat([tokens, new], dim=1)
        if (tokens[:, len(start):] == tok.eos_id).any(1).all():
            break
    texts = []
    for row in tokens[:, len(start):].tolist():
        texts.append(tok.decode(row[:row.index(tok.eos_id)] if tok.eos_id in row else row))
    return texts


@torch.inference_mode()
def fill(model, tok, text, show, device):
    """-> for each [MASK] of text the `show` likeliest tokens as (text, probability), over all rows of the vocabulary.

    A mask stands for a token, and tokens begin with the space before a word: the space before [MASK] is the mask's.
    """
    mask = tok.encoding.decode([tok.mask_id])
    parts = re.split(rf"\s*(?:\[MASK\]|{re.escape(mask)})", text)
    ids = tok.encode(parts[0])
    for part in parts[1:]:
        ids += [tok.mask_id, *tok.encode(part)]
    tokens = torch.tensor([*ids, tok.eos_id], device=device)                                    # closed by eos, as in pretraining
    positions = (tokens == tok.mask_id).nonzero()[:, 0]                                         # [N]
    hidden = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32, device=device), False, positions)
    p, candidates = (x.tolist() for x in model.logits(hidden).float().softmax(-1).topk(show))    # [N, show] each
    return [[(tok.decode([i]) or f"(row {i})", share) for i, share in zip(*gap)] for gap in zip(candidates, p)]


def side_by_side(names, cells):
    """Print a column for each name with the text that belongs to it."""
    width = max(20, (shutil.get_terminal_size().columns - 3 * (len(names) - 1)) // len(names))
    columns = [[line for paragraph in [name, "-" * min(width, len(name)), *text.splitlines()]
                for line in textwrap.wrap(paragraph, width) or [""]] for name, text in zip(names, cells)]
    for i in range(max(map(len, columns))):
        print("   ".join((column[i] if i < len(column) else "").ljust(width) for column in columns).rstrip())
    print()


def main(c):
    if bool(c.ckpt) == bool(c.compare):
        raise UserError("which checkpoint? --ckpt=RUN/step_NNNNNNN, or --compare A B to see several side by side")
    if c.prompt and c.fill:
        raise UserError("--prompt goes on from a text and --fill fills one: give one of them")
    if min(c.max_new_tokens, c.num_samples, c.show) < 1 or min(c.top_k, c.temperature) < 0:
        raise UserError("max_new_tokens, num_samples and show must be at least 1, top_k and temperature at least 0")
    device = pick_device(c.device)
    paths, found = [checkpoint.find(str(name)) for name in c.compare or (c.ckpt,)], []
    for path in paths:
        tok, config = checkpoint.tokenizer_of(path), checkpoint.config_of(path)
        pick_attention(c.attention, device, "float32", config)      # raises if it cannot run here
        model = checkpoint.load_model(path, device, c.attention)
        if c.fill:
            gaps = fill(model, tok, c.fill, min(c.show, config.vocab_size), device)
            if not gaps:
                raise UserError(f"--fill={c.fill}: there is no [MASK] in it")
            found.append(["\n".join(f"{p:7.2%}  {token.strip() or repr(token)}" for token, p in gap) for gap in gaps])
        else:
            found.append([c.prompt + text for text in generate(model, tok, c.prompt, c, device)])
    for i, cells in enumerate(zip(*found)):
        if len(found[0]) > 1:
            print(f"{'mask' if c.fill else 'sample'} {i + 1}")
        side_by_side(paths, cells)


if __name__ == "__main__":
    run(main, Config)
