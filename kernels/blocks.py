"""The block sizes of the Triton attention kernels, for each kind of GPU.

A program works on a block of queries and a block of keys at a time. With larger blocks each key is
loaded less often, until the registers or the shared memory of the GPU run out. When they do depends
on the GPU, the kernel and the head dim, so the sizes stand in a table.

Hopper's rows were chosen by time, on an H200 (docs/log.md, 2026-11-27). The others were chosen by
what the compiler makes of a configuration: registers, spills (registers that did not fit and go
through memory), shared and tensor memory, and so how many programs fit on one streaming
multiprocessor (SM). docs/log.md, 2026-11-26, lists candidates, and tests/aot.py prints the figures
of the table's rows. ATTENTION_AUTOTUNE=1 measures their speed, and may find better sizes. Where
both fit, we prefer two programs of four warps to one of eight: one of them computes its softmax
while the other waits for its products. On the H200 that was faster in every kernel.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """The sizes of one kernel, and how Triton compiles it."""

    BM: int  # rows of queries
    BN: int  # rows of keys
    num_warps: int
    num_stages: int  # blocks whose loads are in flight at once
    tma: bool = False  # load through TMA descriptors instead of pointers


# {compute capability: architecture, which is the key of TABLE}. GPUs share an architecture if they
# have the same tensor core instructions and the same shared memory for a program.
ARCHITECTURES = {
    (8, 0): 80,  # A100: mma.sync, 163 KB
    (8, 6): 89,  # GeForce 30, A10, A40: mma.sync, 99 KB
    (8, 9): 89,  # GeForce 40, L4, L40: the same
    (9, 0): 90,  # Hopper: wgmma, 227 KB, TMA
    (10, 0): 100,  # B200: tcgen05, whose results lie in tensor memory; 227 KB, TMA
    (10, 3): 100,  # B300: the same
    (12, 0): 120,  # GeForce 50, RTX PRO: mma.sync as before, 99 KB, TMA
    (12, 1): 120,  # GB10 (DGX Spark): the same
}
HAS_TMA = (90, 100, 120)


def architecture(major, minor):
    """Return TABLE's key for a GPU of this compute capability.

    A GPU that is not listed gets the blocks that need the least memory: Ada's, loaded by pointers.
    """
    return ARCHITECTURES.get((major, minor), 89)


# {(architecture, kernel, head dim rounded up to a power of two): Blocks}
TABLE = {
    # A100. dkdv at 64 has 32 keys: with 64, and loads in flight, it spills. (32-wide products have
    # crashed on Hopper, triton-lang/triton#10573. The rows of Hopper and of data-centre Blackwell
    # have none.)
    (80, "forward", 64): Blocks(128, 64, 4, 3),
    (80, "forward", 128): Blocks(128, 64, 8, 2),
    (80, "dkdv", 64): Blocks(64, 32, 4, 2),
    (80, "dkdv", 128): Blocks(64, 64, 8, 2),
    (80, "dq", 64): Blocks(64, 64, 4, 2),
    (80, "dq", 128): Blocks(64, 64, 8, 2),
    # Ada and consumer Ampere. A100's blocks fit into their 99 KB. But forward at 64 has one stage
    # less, so that two programs share the 100 KB of an SM.
    (89, "forward", 64): Blocks(128, 64, 4, 2),
    (89, "forward", 128): Blocks(128, 64, 8, 2),
    (89, "dkdv", 64): Blocks(64, 32, 4, 2),
    (89, "dkdv", 128): Blocks(64, 64, 8, 2),
    (89, "dq", 64): Blocks(64, 64, 4, 2),
    (89, "dq", 128): Blocks(64, 64, 8, 2),
    # Hopper. With small blocks of four warps several programs share an SM. On an H200 they take 0.72
    # to 0.96 of the time of larger blocks of eight warps, which the compiler's figures suggested.
    # dkdv at 96 and 128 spills 7 instructions.
    (90, "forward", 64): Blocks(64, 64, 4, 3, True),
    (90, "forward", 128): Blocks(64, 64, 4, 3, True),
    (90, "dkdv", 64): Blocks(64, 64, 4, 2),
    (90, "dkdv", 128): Blocks(64, 64, 4, 2, True),
    (90, "dq", 64): Blocks(64, 64, 4, 2, True),
    (90, "dq", 128): Blocks(64, 64, 4, 2, True),
    # Data-centre Blackwell. Every product has 128 rows (queries, in dkdv keys): 64 would fill half
    # of the 128 lanes of tensor memory. In forward and in dq at 64 two programs share its 512
    # columns. dkdv at 96 and 128 spills 36 instructions, all outside its inner loop; 64 keys would
    # not spill. Triton must be 3.7 or newer here: see why_not in triton_attention.py.
    (100, "forward", 64): Blocks(128, 64, 4, 3, True),
    (100, "forward", 128): Blocks(128, 64, 4, 2, True),
    (100, "dkdv", 64): Blocks(64, 128, 8, 2, True),
    (100, "dkdv", 128): Blocks(64, 128, 8, 2, True),
    (100, "dq", 64): Blocks(128, 64, 8, 3, True),
    (100, "dq", 128): Blocks(128, 64, 8, 3, True),
    # Consumer Blackwell: Ada's blocks, but 32 keys in dq at 64, where 64 spill. dkdv at 96 spills
    # 12 instructions, none in its inner loop. This GPU has TMA, with which nothing spills and a
    # thread needs 8 to 60 registers less. We still use pointers: others have measured TMA at 0.3 to
    # 0.8 of their bandwidth here (kekzl/imp#169), and the form of it that Triton 3.6 emits makes
    # the driver set aside 3.5 GB (tile-ai/tilelang#2052).
    (120, "forward", 64): Blocks(128, 64, 4, 2),
    (120, "forward", 128): Blocks(128, 64, 8, 2),
    (120, "dkdv", 64): Blocks(64, 32, 4, 2),
    (120, "dkdv", 128): Blocks(64, 64, 8, 2),
    (120, "dq", 64): Blocks(64, 32, 4, 2),
    (120, "dq", 128): Blocks(64, 64, 8, 2),
}


# (BM, BN, num_warps, num_stages) that ATTENTION_AUTOTUNE=1 tries, each with TMA and with pointers.
SIZES_TO_TRY = [
    (128, 128, 8, 3),
    (128, 128, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 4, 3),
    (64, 128, 8, 3),
    (64, 128, 8, 2),
    (64, 64, 8, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
]


def candidates(table_key):
    """Return the Blocks that a search tries for a key of TABLE.

    The table's own blocks are among them, so a search never ends with slower ones.
    """
    blocks_to_try = [TABLE[table_key]]
    for tma in (True, False):
        if tma and table_key[0] not in HAS_TMA:
            continue
        for sizes in SIZES_TO_TRY:
            blocks = Blocks(*sizes, tma)
            if blocks not in blocks_to_try:
                blocks_to_try.append(blocks)
    return blocks_to_try
