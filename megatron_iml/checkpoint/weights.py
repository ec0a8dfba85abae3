"""Weights only, from whatever a user has: a native checkpoint or a Hugging Face OPT folder.

What enters: a folder. What leaves: this rank's parameters, filled.

    fill_weights(Path("opt-125m"), chunks, model, layout)                      Hugging Face
    fill_weights(Path("run/checkpoints/iter_0004000"), chunks, model, layout)  native, saved under any layout
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_iml.config import ModelConfig
from megatron_iml.model.opt import OPTModel
from megatron_iml.parallel.groups import Layout
from megatron_iml.training.agree import on_every_rank

from .hugging_face import check_shape, is_hugging_face_folder, load_hugging_face
from .store import check_same_shape, load_weights, read_record


def fill_weights(folder: Path, chunks: Sequence[OPTModel], model: ModelConfig, layout: Layout) -> None:
    """Fill the parameters of this rank's chunks; a collective.

    Raises:
        ValueError: on every rank, if one finds no such folder, no complete checkpoint, a model of another
            shape, or Hugging Face files that are damaged.
    """
    on_every_rank(lambda: check_weights(folder, model))
    if is_hugging_face_folder(folder):
        on_every_rank(lambda: load_hugging_face(folder, chunks, model, layout))
    else:
        # Ranks read a native checkpoint together: not inside on_every_rank.
        load_weights(folder, chunks, model)


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
    if is_hugging_face_folder(folder):
        check_shape(folder, model)
    else:
        check_same_shape(folder, read_record(folder)["config"]["model"], model)
