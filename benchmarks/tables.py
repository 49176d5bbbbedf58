"""README's tables of the training step's speed and memory, from what bench.py left in results/speed/*.jsonl: of each cell the
newest row, and a cell that nobody measured says so. `python bench.py readme` puts them in place."""
import json

from benchmarks.train import NAMES
from core.files import find_files

BEGIN, END = "<!-- bench.py readme: begin -->\n", "<!-- bench.py readme: end -->\n"
SIZES = ("210m", "610m", "1b")
GPU = {"vocab_size": 128_256, "rows": 12, "block_size": 2048, "random_length": True, "dtype": "bfloat16",
       "checkpoint_activations": False}


def read(folder):
    """All rows, older before newer within a file."""
    found = []
    for path in find_files(folder, "*.jsonl"):
        with open(path, encoding="utf-8") as f:
            found += [json.loads(line) for line in f if line.strip()]
    return found


def newest(rows, /, **wanted):
    return next((row for row in reversed(rows) if all(row.get(k) == v for k, v in wanted.items())), None)


def kind(row):
    """"cuda" or "cpu"; the oldest rows do not say, and are a CPU's."""
    return row.get("kind", "cpu")


def cell(row, gpu):
    """What one measured row says; the ratio is theirs / ours within one run."""
    if row is None:
        return "not measured"
    if "why" in row:
        return row["why"]
    ratio = f", {row['ratio']:.2f} x" if row.get("reference") == "ours" and row["key"] != "ours" else ""
    if gpu:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "no published peak"
        return f"{row['tok_per_s']:,.0f}, {mfu}, {row['peak'] / 2 ** 30:.0f} GiB, {row['first']:.0f} s{ratio}"
    return f"{row['tok_per_s']:,.0f}{ratio}"


def table(head, body):
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)) + "\n"


def gpu_table(rows):
    """The paper's three sizes on every GPU that has rows; on "one H100" if there is none."""
    rows = [r for r in rows if r["bench"] == "train" and kind(r) != "cpu" and r["size"] in SIZES
            and all(r.get(k) == v for k, v in GPU.items())]
    devices = list(dict.fromkeys(r["device"] for r in rows)) or ["one H100"]
    body = [[name, *(cell(newest(rows, device=d, size=size, key=key), gpu=True) for d in devices for size in SIZES)]
            for key, name in NAMES.items() if key != "ours-malloc" and not key.startswith("nanogpt-")]
    return table(["training step", *(f"{size}, {d}" for d in devices for size in SIZES)], body)


def cpu_table(rows):
    """A column for each machine, precision and shape that was measured on a CPU."""
    rows = [r for r in rows if r["bench"] == "train" and kind(r) == "cpu"]
    shape = ("device", "size", "dtype", "vocab_size", "rows", "block_size", "random_length")
    columns = list(dict.fromkeys(tuple(r[k] for k in shape) for r in rows))
    head = ["<br>".join([*device.split(", ")[:2], dtype, f"vocabulary {v:,}", f"{r} x {n}, {'cut' if cut else 'whole rows'}"])
            for device, _, dtype, v, r, n, cut in columns]
    body = [[name, *(cell(newest(rows, key=key, **dict(zip(shape, values))), gpu=False) for values in columns)]
            for key, name in NAMES.items() if key != "ours-kernel"]
    return table([f"training step of {columns[0][1] if columns else 'small'}, tokens/s", *head], body)


def memory_table(rows):
    """The most rows of 2,048 tokens in a micro-batch."""
    rows = [r for r in rows if r["bench"] == "memory" and r["memory_gib"] in (0, 80) and kind(r) != "cpu"]

    def says(size, flag):
        row = newest(rows, size=size, vocab_size=GPU["vocab_size"], block_size=GPU["block_size"], checkpoint_activations=flag)
        return f"{row['rows']} ({row['device'].split(',')[0]})" if row else "not measured"
    return table(["most rows of 2,048 tokens that fit", *SIZES],
                 [[name, *(says(size, flag) for size in SIZES)]
                  for name, flag in (("as it is", False), ("--checkpoint_activations=true", True))])


def put(text, folder):
    """README's text with the tables between the two marks made anew from the rows in `folder`."""
    rows, (before, rest) = read(folder), text.split(BEGIN)
    return before + BEGIN + "\n".join((
        "One GPU, 12 x 2,048 tokens a step, each row cut once, vocabulary 128,256, bf16: tokens/s, MFU, peak memory, seconds to\n"
        "the first step, how many times ours is as fast:\n", gpu_table(rows), memory_table(rows),
        "A CPU: tokens/s, and how many times ours is as fast in the same run:\n", cpu_table(rows))) + END + rest.split(END)[1]
