"""The settings that several parts of bench.py share, and how child processes get theirs."""
from dataclasses import dataclass, fields

from core.configurator import PositiveInt, Share, UserError
from model import SIZES, ModelConfig
from pretraining.data import DataSettings, check_block_size


@dataclass
class StepSettings:
    """A training step: the model, its data, and the machine."""
    # the model, and one training step of it
    size: str = "small"                   # a key of model.SIZES
    vocab_size: PositiveInt = 8192        # of embedding and head
    block_size: PositiveInt = 512         # tokens in a row
    rows: PositiveInt = 8                 # rows in a step
    random_length: bool = True            # cut each row once, as train.py does; false: whole rows
    mask_rate: Share = 0.4                # share of the tokens that MLM hides
    checkpoint_activations: bool = False  # ours with this setting of train.py
    device: str = "auto"                  # cuda where there is one, else cpu
    dtype: str = "auto"                   # of ours and Hugging Face's; nanoGPT takes what it ships with

    def __post_init__(self):
        check_sizes((self.size,), f"size={self.size}")
        check_block_size(self.block_size, self.random_length)

    def model_config(self):
        dimensions = SIZES[self.size]
        return ModelConfig(**dimensions, vocab_size=self.vocab_size, block_size=self.block_size)

    def data_settings(self):
        """What pretraining.data needs to make a step's batch, as one micro-batch."""
        return DataSettings(self.block_size, batch_rows=self.rows, random_length=self.random_length,
                            mask_rate=self.mask_rate)

    def in_words(self):
        tokens = f"{self.rows} x {self.block_size} tokens"
        return f"{self.size}, vocabulary {self.vocab_size:,}, {tokens} a step"


def check_sizes(sizes, setting):
    """Raise UserError unless every size is a key of model.SIZES.

    setting: how the user wrote them, "size=7b".
    """
    unknown = set(sizes) - set(SIZES)
    if unknown or not sizes:
        raise UserError(f"{setting}: expected sizes out of {', '.join(SIZES)}")


def settings_for(settings_class, c, **changes):
    """Return a `settings_class` with the values that `c` has for the same settings, and changes."""
    shared = {}
    for field in fields(settings_class):
        if hasattr(c, field.name):
            shared[field.name] = getattr(c, field.name)
    return settings_class(**(shared | changes))


def as_flags(c):
    """Return the words --key=value that give a child process the settings of `c`.

    Settings at their default are left out, and so is `args`, which holds words without a key.
    """
    default = type(c)()
    flags = []
    for key, value in vars(c).items():
        if key != "args" and value != getattr(default, key):
            flags.append(f"--{key}={value}")
    return flags
