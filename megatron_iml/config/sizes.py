"""The published sizes of OPT and the number of parameters of any of them.

    opt_size("opt-125m")   ->  OPTSize(num_layers=12, hidden_size=768, num_attention_heads=12)
    parameter_count(model) ->  125,239,296 for that size with OPT's 50,272 x 768 embedding

Shapes: Zhang et al. 2022, table 1, and metaseq's launcher/opt_job_constants.py. Every feed-forward layer is
4 x hidden_size wide.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import NamedTuple

from megatron_iml.config.schema import ModelConfig

POSITION_OFFSET = 2
"""OPT's first position reads row 2 of its table: rows 0 and 1 are fairseq's <s> and padding."""


class OPTSize(NamedTuple):
    """Shape of one published OPT."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int


OPT_SIZES: Mapping[str, OPTSize] = MappingProxyType(
    {
        # In order of size, which messages keep. No opt-350m: see `opt_size`.
        "opt-125m": OPTSize(12, 768, 12),
        "opt-1.3b": OPTSize(24, 2048, 32),
        "opt-2.7b": OPTSize(32, 2560, 32),
        "opt-6.7b": OPTSize(32, 4096, 32),
        "opt-13b": OPTSize(40, 5120, 40),
        "opt-30b": OPTSize(48, 7168, 56),
        "opt-66b": OPTSize(64, 9216, 72),
        "opt-175b": OPTSize(96, 12288, 96),
    }
)


def opt_size(name: str) -> OPTSize:
    """Shape of the OPT called `name`; `ValueError` with the nearest names if there is none."""
    # Before the look-up, whose nearest names would suggest it is a slip of the pen for opt-30b.
    if name == "opt-350m":
        raise ValueError(
            "model.size: got opt-350m; allowed: the pre-LayerNorm sizes "
            f"{', '.join(OPT_SIZES)}; use opt-125m or opt-1.3b instead\n"
            "opt-350m is another architecture: LayerNorm after the residual sum, no final LayerNorm, and a "
            "512-wide embedding projected in and out."
        )
    if name not in OPT_SIZES:
        # A name unlike any other (llama-7b) gets the whole list rather than nothing.
        nearest = get_close_matches(name, OPT_SIZES, n=3, cutoff=0.5) or list(OPT_SIZES)
        raise ValueError(
            f"model.size: got {name!r}; allowed: {', '.join(OPT_SIZES)}; did you mean {' or '.join(nearest)}?"
        )
    return OPT_SIZES[name]


def parameter_count(model: ModelConfig) -> int:
    """Parameters of a resolved `model`; the output layer is the word embedding, so it counts once.

    With f = 4d this is V d + (P + 2) d + L (12 d^2 + 13 d) + 2 d for V words, P positions, L layers, width d.
    """
    d, f = model.hidden_size, model.ffn_hidden_size
    embeddings = (model.vocab_size + model.max_position_embeddings + POSITION_OFFSET) * d
    # Query, key, value and output projection, each with a bias.
    attention = 4 * d * d + 4 * d
    feed_forward = 2 * d * f + f + d
    # Two norms of a weight and a bias; the 2 d at the end are the final one's.
    layer_norms = 4 * d
    return embeddings + model.num_layers * (attention + feed_forward + layer_norms) + 2 * d
