"""The parts of bench.py.

    train        a whole training step, beside the peers
    contestants  who takes part: ours, ours with one feature off, EuroBERT, nanoGPT
    race         the contestants as processes that take turns
    profile      where the time of a step goes
    steady       train.py over a thousand steps
    ddp          train.py on two processes
    memory       the most rows that a step can have
    runs         train.py, started and watched from outside
    kernels      attention and the loss beside PyTorch's
    data         batches from a corpus, and preparing one
    preparation  the ways to prepare a corpus that `data` times
    finetune     a grid of trials beside a Hugging Face Trainer loop
    search       exact search beside numpy and FAISS
    alive        does everything run on this machine?
    steps        the training step of several sizes in one process
    settings     the settings that several parts share
    rows         a row of JSON for each result
    tables       the tables of docs/speed.md, from the rows
    summary      the most important figures of a file of rows
"""
