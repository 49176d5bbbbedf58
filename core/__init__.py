"""What all other folders but kernels/ stand on. It imports none of them.

    configurator   settings: a dataclass, config files, --key=value
    ctrl_c         an interrupt during the imports
    checkpoint     folders of weights, optimizer state and facts, written completely and checked
    tokenizer      text to ids and back: tiktoken's BPE, learned here or imported
    device         which device, which precision, is there a compiler; memory and peak FLOP/s
    distributed    torchrun's processes
    lock           one writer a folder
    schema         JSON of others: read it and check its shape
    files          complete writes, JSON, packed files, a background thread that reads ahead
    rng            random choices as pure functions of (seed, epoch, index)
"""
