"""Weights only, from whatever a user has: a native checkpoint, a Hugging Face folder or metaseq's files.

What enters: a folder. What leaves: this rank's parameters, filled.

    fill_weights(Path("opt-125m"), chunks, model, layout)                      Hugging Face
    fill_weights(Path("run/checkpoints/iter_0004000"), chunks, model, layout)  native, saved under any layout
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_iml.checkpoint.conversion.convert import fit_vocabulary
from megatron_iml.checkpoint.conversion.formats import is_foreign, open_source
from megatron_iml.checkpoint.conversion.parameter_map import WORD_EMBEDDING, parameters
from megatron_iml.config import ModelConfig
from megatron_iml.model.opt import OPTModel
from megatron_iml.model.parameters import copy_full_tensor, named_global_parameters
from megatron_iml.parallel.groups import Layout
from megatron_iml.training.agree import on_every_rank

from .load import check_share_of_files, load_weights
from .record import check_same_shape, read_record


def fill_weights(folder: Path, chunks: Sequence[OPTModel], model: ModelConfig, layout: Layout) -> None:
    """Fill the parameters of this rank's chunks; a collective.

    Raises:
        ValueError: on every rank, if one finds no such folder, no complete checkpoint, a model of another
            shape, or files that are damaged.
    """
    on_every_rank(lambda: check_weights(folder, model))
    if is_foreign(folder):
        on_every_rank(lambda: fill_from_source(folder, chunks, model, layout))
    else:
        on_every_rank(lambda: check_share_of_files(folder, read_record(folder), weights_only=True))
        # Ranks read a native checkpoint together: not inside on_every_rank.
        load_weights(folder, chunks, model)


def fill_from_source(folder: Path, chunks: Sequence[OPTModel], model: ModelConfig, layout: Layout) -> None:
    """Fill the parameters of this rank's stage from another format, one tensor at a time. No collective."""
    # Our own number of heads: files of metaseq's need not say theirs, and they were compared where they do.
    source = open_source(folder, model.num_attention_heads)
    theirs = parameters(source.model)
    for name, parameter in named_global_parameters(chunks):
        # A view on the file: a 175B folder does not fit a node's memory once per rank.
        full = source.read(theirs[name])
        if name == WORD_EMBEDDING:
            full = fit_vocabulary(full, model)
        copy_full_tensor(parameter, full, layout.tensor_rank, layout.tensor_size)


def check_weights(folder: Path, model: ModelConfig) -> None:
    """Find what a user can get wrong before anything is loaded. No collective, no torch tensor.

    Raises:
        FileNotFoundError: if there is no such folder, or it is no complete checkpoint.
        ValueError: if the folder's model has another shape.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"weights {folder}: no such folder; name a Hugging Face OPT folder or a native checkpoint "
            "(.../checkpoints/iter_0004000), or set model.initialisation=random for a random start"
        )
    if not is_foreign(folder):
        check_same_shape(folder, read_record(folder).config["model"], model)
        return
    theirs = vars(open_source(folder, model.num_attention_heads).model)
    # Rows that only pad the vocabulary may be more here; an id that has no row there cannot be.
    if theirs["vocab_size"] > model.vocab_size:
        raise ValueError(
            f"{folder} has {theirs['vocab_size']} embedding rows but model.vocab_size is {model.vocab_size}: "
            f"set model.vocab_size={theirs['vocab_size']}"
        )
    check_same_shape(folder, {**theirs, "vocab_size": model.vocab_size}, model)
