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

from .hugging_face import is_hugging_face_folder, load_hugging_face
from .store import load_weights


def fill_weights(folder: Path, chunks: Sequence[OPTModel], model: ModelConfig, layout: Layout) -> None:
    """Fill the parameters of this rank's chunks.

    Raises:
        FileNotFoundError: if there is no such folder, or it is no complete checkpoint.
        ValueError: if the folder's model has another shape or is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"weights {folder}: no such folder; name a Hugging Face OPT folder or a native checkpoint "
            "(.../checkpoints/iter_0004000), or set model.initialisation=random for a random start"
        )
    if is_hugging_face_folder(folder):
        load_hugging_face(folder, chunks, model, layout)
    else:
        load_weights(folder, chunks, model)
