"""Compile every shipped Triton configuration ahead of time, on a machine without a GPU, and print a JSON row of each.

    python tests/aot.py 90        # compute capability, e.g. 80, 86, 89, 90, 100, 103, 120

The blocks are those that kernels/triton_attention.py would take on such a GPU. TRITON_PTXAS_PATH selects
another assembler (TRITON_PTXAS_BLACKWELL_PATH from 100 on).

A process of its own, since kernels that were imported under TRITON_INTERPRET=1 cannot be compiled.
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
POINTERS = {"LSE": "*fp32", "DELTA": "*fp32", "START": "*i32", "END": "*i32"}
OPERANDS = {"forward": {"Q": "BM", "K": "BN", "V": "BN"}, "dkdv": {"Q": "BM", "K": "BN", "V": "BN", "DO": "BM"},
            "dq": {"Q": "BM", "K": "BN", "V": "BN", "DO": "BM"}}


def compiled(kernel, types, constants, cc, warps, stages):
    """The kernel as the just-in-time compiler would make it: pointers and strides are multiples of 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [n for n in names if n not in constants and (types[n].startswith("*") or n in ("T", "V", "row_stride") or n[0] == "s" and types[n] == "i32")]
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()},
                       attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=dict(num_warps=warps, num_stages=stages))


def report(binary):
    """What the assembler made of it: registers, spills to local memory, shared and tensor memory, tensor core and TMA
    instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        dump = [subprocess.run([os.path.join(BIN, "cuobjdump"), flag, f.name], capture_output=True, text=True, check=True).stdout
                for flag in ("-res-usage", "-sass")]
    count = {name: len(re.findall(pattern, dump[1])) for name, pattern in
             (("spills", r"\b(?:LDL|STL)"), ("mma", r"\bHMMA"), ("wgmma", r"\bHGMMA"), ("tcgen05", r"\bUTCHMMA"),
              ("tma_loads", r"\bUTMALDG"))}
    registers = int(re.search(r"REG:(\d+)", dump[0])[1])
    tensor_memory = binary.metadata.tmem_size or 0      # columns, of 512; None where there is no such memory
    return {"registers": registers, "shared": binary.metadata.shared, "tensor_memory": tensor_memory} | count


def attention_row(job):
    cc, (_, name, width), blocks, D, causal = job
    kernel = getattr(kernels.triton_kernels, f"{name}_kernel")
    constants = dict(GROUP=3, D=D, BD=width, CAUSAL=causal, BM=blocks.BM, BN=blocks.BN, TMA=blocks.tma)
    types = {n: "fp32" if n == "sm_scale" else "i32" if n in ("T", "H") or n.startswith("s") else POINTERS.get(n, "*bf16")
             for n in kernel.arg_names if n not in constants}
    if blocks.tma:
        outer = "BN" if name == "dkdv" else "BM"
        types |= {n: f"tensordesc<bf16[{getattr(blocks, rows)},{'' if rows == outer else '1,'}{width}]>" for n, rows in OPERANDS[name].items()}
    binary = compiled(kernel, types, constants, cc, blocks.num_warps, blocks.num_stages)
    return {"kernel": name, "head_dim": D, "causal": causal} | blocks._asdict() | report(binary)


def loss_row(cc):
    types = {"LOGITS": "*bf16", "TARGETS": "*i64", "LOSS": "*fp32", "row_stride": "i32", "V": "i32"}
    return {"kernel": "loss", "B": 8192} | report(compiled(kernels.cross_entropy.row_kernel, types, dict(B=8192, GRADIENT=True), cc, 8, 1))


def small_rows(cc):
    """The two kernels that only load and store, with lengths of any kind and, as the compiler specialises 1, of one token."""
    rows = []
    pointers = {"CU": "*i32", "START": "*i32", "END": "*i32", "O": "*bf16", "DO": "*bf16", "DELTA": "*fp32"}
    for name, constants in (("bounds", dict(B=256)), ("delta", dict(D=96, BD=128, B=64))):
        for ones in ({}, {"T": 1, "H": 1, "S": 1}):
            kernel = getattr(kernels.triton_kernels, f"{name}_kernel")
            fixed = constants | {n: 1 for n in ones if n in kernel.arg_names}
            types = {n: pointers.get(n, "i32") for n in kernel.arg_names if n not in fixed}
            rows.append({"kernel": name, "one": bool(ones)} | report(compiled(kernel, types, fixed, cc, 4, 2)))
    return rows


def main():
    cc = int(sys.argv[1])
    architecture = kernels.triton_kernels.architecture(*divmod(cc, 10))
    jobs = [(cc, key, blocks, D, True) for key, blocks in kernels.triton_kernels.TABLE.items() if key[0] == architecture
            for D in kernels.triton_kernels.HEAD_DIMS if triton.next_power_of_2(D) == key[2]]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        loss, small = pool.submit(loss_row, cc), pool.submit(small_rows, cc)
        for row in pool.map(attention_row, jobs):
            print(json.dumps(row), flush=True)
        for row in (loss.result(), *small.result()):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
