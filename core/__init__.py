"""What everything else stands on, and what knows nothing of pretraining or tasks.

    configurator   settings: a dataclass, config files, --key=value
    checkpoint     folders of weights, optimizer state and facts: written whole, checked, never unpickled
    tokenizer      bytes to ids: tiktoken's BPE, learned here or by others
    device         which device, which precision, is there a compiler; memory and peak FLOP/s
    distributed    torchrun's processes
    files          files written whole; packed files; a background thread that reads ahead
    rng            random choices as pure functions of (seed, epoch, index)
"""
