"""Compile every shipped Triton configuration ahead of time, on a machine without a GPU, and print a JSON row of each.

    python tests/aot.py 90        # compute capability, e.g. 80, 86, 89, 90, 100, 103, 120

The blocks are those that kernels/triton_attention.py would take on such a GPU. TRITON_PTXAS_PATH selects another assembler
(TRITON_PTXAS_BLACKWELL_PATH from 100 on). This is a process of its own, because kernels that were imported under
TRITON_INTERPRET=1 cannot be compiled.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import kernels  # noqa: E402

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

# The parameters of the attention kernels: what TMA may load, in blocks of so many rows; the other pointers; all
# pointers that are missing here are bfloat16.
OPERANDS = {"forward": {"Q": "BM", "K": "BN", "V": "BN"},
            "dkdv": {"Q": "BM", "K": "BN", "V": "BN", "DO": "BM"},
            "dq": {"Q": "BM", "K": "BN", "V": "BN", "DO": "BM"}}
POINTERS = {"LSE": "*fp32", "DELTA": "*fp32", "START": "*i32", "END": "*i32"}
INSTRUCTIONS = {"spills": r"\b(?:LDL|STL)", "mma": r"\bHMMA", "wgmma": r"\bHGMMA", "tcgen05": r"\bUTCHMMA", "tma_loads": r"\bUTMALDG"}


def is_multiple_of_16(name, kind):
    """Pointers, strides and lengths are multiples of 16 in a training step, and the just-in-time compiler notices."""
    return kind.startswith("*") or name.endswith("stride") or name in ("T", "V")


def compiled(kernel, types, constants, cc, warps, stages):
    """Compile a kernel as the just-in-time compiler would for a training step."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    constexprs = {(names.index(n),): value for n, value in constants.items()}
    attrs = {}
    for n in names:
        if n not in constants and is_multiple_of_16(n, types[n]):
            attrs[(names.index(n),)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=dict(num_warps=warps, num_stages=stages))


def cuobjdump(path, flag):
    return subprocess.run([os.path.join(BIN, "cuobjdump"), flag, path], capture_output=True, text=True, check=True).stdout


def report(binary):
    """What the assembler made of it: registers, spills to local memory, shared and tensor memory, tensor core and TMA
    instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        usage = cuobjdump(f.name, "-res-usage")
        assembly = cuobjdump(f.name, "-sass")
    row = {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "shared": binary.metadata.shared}
    row["tensor_memory"] = binary.metadata.tmem_size or 0      # columns, of 512; None where there is no such memory
    for name, pattern in INSTRUCTIONS.items():
        row[name] = len(re.findall(pattern, assembly))
    return row


def attention_type(name):
    if name == "scale":
        return "fp32"
    if name in ("T", "H") or name.endswith("stride"):
        return "i32"
    return POINTERS.get(name, "*bf16")


def attention_row(job):
    cc, (_, name, width), blocks, D, causal = job
    kernel = getattr(kernels.triton_kernels, f"{name}_kernel")
    constants = dict(GROUP=3, D=D, BD=width, CAUSAL=causal, BM=blocks.BM, BN=blocks.BN, TMA=blocks.tma)
    types = {n: attention_type(n) for n in kernel.arg_names if n not in constants}
    if blocks.tma:
        outer = "BN" if name == "dkdv" else "BM"
        for n, size_name in OPERANDS[name].items():
            n_rows = getattr(blocks, size_name)
            box = f"{n_rows},{width}" if size_name == outer else f"{n_rows},1,{width}"
            types[n] = f"tensordesc<bf16[{box}]>"
    binary = compiled(kernel, types, constants, cc, blocks.num_warps, blocks.num_stages)
    return {"kernel": name, "head_dim": D, "causal": causal} | blocks._asdict() | report(binary)


def loss_row(cc):
    types = {"LOGITS": "*bf16", "TARGETS": "*i64", "LOSS": "*fp32", "row_stride": "i32", "V": "i32"}
    binary = compiled(kernels.cross_entropy.row_kernel, types, dict(B=8192, GRADIENT=True), cc, 8, 1)
    return {"kernel": "loss", "B": 8192} | report(binary)


def small_rows(cc):
    """The two kernels that only load and store, for many tokens, and for one: the compiler makes another kernel for the number 1."""
    rows = []
    types = {"CU_SEQLENS": "*i32", "START": "*i32", "END": "*i32", "O": "*bf16", "DO": "*bf16", "DELTA": "*fp32"}
    for name, constants in (("bounds", dict(B=256)), ("delta", dict(D=96, BD=128, B=64))):
        kernel = getattr(kernels.triton_kernels, f"{name}_kernel")
        for is_one in (False, True):
            fixed = dict(constants)
            if is_one:
                fixed |= {n: 1 for n in ("T", "H", "S") if n in kernel.arg_names}
            kernel_types = {n: types.get(n, "i32") for n in kernel.arg_names if n not in fixed}
            rows.append({"kernel": name, "one": is_one} | report(compiled(kernel, kernel_types, fixed, cc, 4, 2)))
    return rows


def main():
    cc = int(sys.argv[1])
    architecture = kernels.triton_kernels.architecture(*divmod(cc, 10))
    jobs = []
    for key, blocks in kernels.triton_kernels.TABLE.items():
        for D in kernels.triton_kernels.HEAD_DIMS:
            if key[0] == architecture and key[2] == triton.next_power_of_2(D):
                jobs.append((cc, key, blocks, D, True))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        loss = pool.submit(loss_row, cc)
        small = pool.submit(small_rows, cc)
        for row in pool.map(attention_row, jobs):
            print(json.dumps(row), flush=True)
        for row in (loss.result(), *small.result()):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
