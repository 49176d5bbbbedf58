"""The tables of docs/speed.md: speed and memory of a training step, and kernels beside PyTorch's, from
the rows in results/speed.

    python bench.py readme

A cell shows the newest row that was measured for it, or "not measured".
"""
import json
import os
from dataclasses import dataclass

from benchmarks.contestants import NAMES
from core.configurator import Path
from core.files import ROOT, find_files, write_whole

# The page with the tables, which stand between these marks.
PAGE = os.path.join("docs", "speed.md")
BEGIN = "<!-- bench.py readme: begin -->\n"
END = "<!-- bench.py readme: end -->\n"
BEGIN_KERNELS = "<!-- bench.py readme, kernels: begin -->\n"
END_KERNELS = "<!-- bench.py readme, kernels: end -->\n"

# The tables for GPUs: the paper's sizes, and the step that the text above the tables describes.
SIZES = ("210m", "610m", "1b")
GPU = {
    "vocab_size": 128_256,
    "rows": 12,
    "block_size": 2048,
    "random_length": True,
    "dtype": "bfloat16",
    "checkpoint_activations": False,
}
# The kernel tables have a column for each of these; the names are those that the rows have.
RIVALS_IN_ATTENTION = ("varlen_attn", "FlexAttention", "SDPA flash", "SDPA cuDNN")
RIVALS_IN_LOSS = ("F.cross_entropy, compiled",)
# The table for CPUs has a column for each combination of these values.
CPU_COLUMN = ("device", "size", "dtype", "vocab_size", "rows", "block_size", "random_length")


@dataclass
class Config:
    rows: Path = "results/speed"  # folder of the .jsonl files with the rows


def readme(c):
    path = os.path.join(ROOT, PAGE)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    new_text = put_tables(text, c.rows)
    write_whole(path, new_text.encode())
    outcome = "the tables have changed" if new_text != text else "nothing to change"
    print(f"{PAGE}: {outcome}")


def put_tables(text, folder):
    """Return a page's text with new tables between the marks, from the rows in `folder`."""
    rows = read_rows(folder)
    step_tables = "\n".join((
        "One GPU, 12 x 2,048 tokens a step, each row cut once, vocabulary 128,256, bf16: tokens/s, "
        "MFU, peak memory, seconds to\nthe first step, our MLM step's speedup over it:\n",
        gpu_table(rows),
        memory_table(rows),
        "A CPU: tokens/s, and our MLM step's speedup over it in the same run:\n",
        cpu_table(rows),
    ))
    text = put_between(BEGIN, step_tables, END, text)
    return put_between(BEGIN_KERNELS, kernel_tables(rows), END_KERNELS, text)


def put_between(begin, new, end, text):
    """Return `text` with `new` in place of what stands between the marks `begin` and `end`."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + new + end + after


# --------------------------------------------------------------------------------------------------
# rows

def read_rows(folder):
    """Return the rows of all files. Within a file the older ones come first."""
    rows = []
    for path in find_files(folder, "*.jsonl"):
        with open(path, encoding="utf-8") as f:
            rows += [json.loads(line) for line in f if line.strip()]
    return rows


def has_values(row, values):
    return all(row.get(key) == value for key, value in values.items())


def newest(rows, values):
    """Return the last row that has these values, or None."""
    for row in reversed(rows):
        if has_values(row, values):
            return row
    return None


def device_kind(row):
    """Return "cuda" or "cpu". The oldest rows do not say, but they are from CPUs."""
    return row.get("kind", "cpu")


# --------------------------------------------------------------------------------------------------
# tables

def markdown(head, body):
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def gpu_table(rows):
    """A column for each GPU and size. Without any rows, the GPU is "one H100"."""
    rows = [row for row in rows if row["bench"] == "train" and device_kind(row) != "cpu"]
    rows = [row for row in rows if row["size"] in SIZES and has_values(row, GPU)]
    devices = list(dict.fromkeys(row["device"] for row in rows)) or ["one H100"]
    columns = []
    for device in devices:
        for size in SIZES:
            columns.append((device, size))
    body = []
    for key, name in NAMES.items():
        # ours-malloc and three of nanoGPT's four variants are measured on CPUs only.
        if key != "ours-malloc" and not key.startswith("nanogpt-"):
            line = [name]
            for device, size in columns:
                row = newest(rows, {"device": device, "size": size, "key": key})
                line.append(gpu_cell(row))
            body.append(line)
    return markdown(["training step", *(f"{size}, {device}" for device, size in columns)], body)


def gpu_cell(row):
    if row is None:
        return "not measured"
    if "why" in row:
        return row["why"]
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "no published peak"
    gib = row["peak"] / 2 ** 30
    ratio = ratio_to_ours(row)
    return f"{row['tok_per_s']:,.0f}, {mfu}, {gib:.0f} GiB, {row['first']:.0f} s{ratio}"


def ratio_to_ours(row):
    """Return, in words, our speedup over it in the same run; "" for ours itself or if ours failed."""
    if row.get("reference") == "ours" and row["key"] != "ours" and "ratio" in row:
        return f", {row['ratio']:.2f} x"
    return ""


def cpu_table(rows):
    """A column for each machine, precision and shape that was measured on a CPU."""
    rows = [row for row in rows if row["bench"] == "train" and device_kind(row) == "cpu"]
    columns = []       # {key of CPU_COLUMN: value}
    for row in rows:
        column = {key: row[key] for key in CPU_COLUMN}
        if column not in columns:
            columns.append(column)
    body = []
    for key, name in NAMES.items():
        # A CPU has no attention kernel that "ours-kernel" could go without.
        if key != "ours-kernel":
            cells = [cpu_cell(newest(rows, column | {"key": key})) for column in columns]
            body.append([name, *cells])
    size = columns[0]["size"] if columns else "small"
    headings = [cpu_heading(column) for column in columns]
    return markdown([f"training step of {size}, tokens/s", *headings], body)


def cpu_heading(column):
    device_and_threads = column["device"].split(", ")[:2]
    vocabulary = f"vocabulary {column['vocab_size']:,}"
    cuts = "cut" if column["random_length"] else "whole rows"
    shape = f"{column['rows']} x {column['block_size']}, {cuts}"
    return "<br>".join([*device_and_threads, column["dtype"], vocabulary, shape])


def cpu_cell(row):
    if row is None:
        return "not measured"
    if "why" in row:
        return row["why"]
    return f"{row['tok_per_s']:,.0f}{ratio_to_ours(row)}"


def memory_table(rows):
    """The most rows of 2,048 tokens in a micro-batch, of each size."""
    rows = [row for row in rows if row["bench"] == "memory" and device_kind(row) != "cpu"]
    rows = [row for row in rows if row["memory_gib"] in (0, 80)]
    lines = (("all activations kept", False), ("--checkpoint_activations=true", True))
    body = []
    for name, is_checkpointed in lines:
        cells = [memory_cell(rows, size, is_checkpointed) for size in SIZES]
        body.append([name, *cells])
    return markdown(["most rows of 2,048 tokens that fit", *SIZES], body)


def memory_cell(rows, size, is_checkpointed):
    row = newest(rows, {
        "size": size,
        "vocab_size": GPU["vocab_size"],
        "block_size": GPU["block_size"],
        "checkpoint_activations": is_checkpointed,
    })
    if row is None:
        return "not measured"
    return f"{row['rows']} ({row['device'].split(',')[0]})"


def kernel_tables(rows):
    """Attention and the loss beside others: our time, our TFLOP/s, and our speedup over each."""
    attention = {}    # {what stands in the first three columns: {name: newest row}}
    loss = {}
    for row in rows:
        if row.get("pass") != "both" or device_kind(row) == "cpu":
            continue
        gpu = row["device"].split(",")[0]
        if row["bench"] == "attention":
            H, Hkv, D = row["heads"]
            packing = "rows cut once" if row["packing"] == "cuts" else "whole rows"
            mask = "causal" if row["causal"] else "full"
            case = (gpu, f"{row['size']} ({H}/{Hkv} heads of {D})", f"{packing}, {mask}")
            attention.setdefault(case, {})[row["name"]] = row
        else:
            case = (gpu, row["size"], f"{row['positions']:,} x {row['vocab_size']:,}")
            loss.setdefault(case, {})[row["name"]] = row
    if not attention:
        return "No kernels have been measured yet.\n"
    head = ["GPU", "attention of", "sequences", "ours", *RIVALS_IN_ATTENTION]
    tables = markdown(head, kernel_lines(attention, RIVALS_IN_ATTENTION))
    head = ["GPU", "loss of", "targets x vocabulary", "ours", *RIVALS_IN_LOSS]
    return tables + "\n" + markdown(head, kernel_lines(loss, RIVALS_IN_LOSS))


def kernel_lines(cases, rivals):
    """The lines of a kernel table. Its cells stay empty where a kernel could not run."""
    lines = []
    for case, row_of in cases.items():
        our_row = row_of.get("ours", {})
        our_speed = f"{our_row['ms']:.2f} ms, {our_row['tflops']:.0f} TFLOP/s" if "ms" in our_row else ""
        line = [*case, our_speed]
        for name in rivals:
            row = row_of.get(name, {})
            line.append(f"{row['ratio']:.2f} x" if "ratio" in row else "")
        lines.append(line)
    return lines
