"""From shards to training steps.

    data     rows, cuts and batches, each a pure function of (seed, epoch, index)
    resume   where a run begins: from scratch, from its own checkpoint, as a branch, or from other weights
    lifetime the lock on a run's folder, and the signals that end the run
    log      what a run reports: on the console, in log.jsonl, to Weights & Biases
"""
