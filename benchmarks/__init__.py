"""The parts of bench.py.

    train     whole training steps: ours, with one feature off at a time, and the peers
    race      the contestants as processes that take turns
    kernels   attention and the loss beside PyTorch's
    gpu       what runs/gpu.sh measures
    data      reading and preparing a corpus
    finetune  a grid of trials beside a Hugging Face Trainer loop
    search    exact search beside numpy and FAISS
    runs      train.py over a thousand steps, on two processes, at the end of the memory
    rows      a row of JSON for each fact
    tables    the README's tables, from the rows
    summary   the figures of a rows file that decide something
"""
