"""Starts from a Hugging Face OPT folder: its weights, sliced for this rank's place in the layout.

What enters: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin` (sharded or not). What
leaves: the parameters of this rank's chunks, filled. Tensors are read one at a time from the mapped files.

    load_hugging_face(Path("opt-125m"), chunks, config.model, layout)
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iml.config import ModelConfig
from megatron_iml.model.opt import OPTModel
from megatron_iml.model.parameters import copy_full_tensor, named_global_parameters
from megatron_iml.parallel.groups import Layout

from .parameter_map import fuse_qkv, hugging_face_names


def is_hugging_face_folder(folder: Path) -> bool:
    """Whether the folder holds a Hugging Face OPT model."""
    path = folder / "config.json"
    return path.is_file() and json.loads(path.read_text()).get("model_type") == "opt"


def load_hugging_face(folder: Path, chunks: Sequence[OPTModel], model: ModelConfig, layout: Layout) -> None:
    """Fill the parameters of this rank's stage.

    Raises:
        ValueError: if the folder's model has another shape or is OPT-350m's variant, or a tensor is missing.
    """
    check_shape(folder, model)
    read = open_tensors(folder)
    head_dim = model.hidden_size // model.num_attention_heads
    for name, parameter in named_global_parameters(chunks):
        # One at a time: a 175B folder does not fit a node's memory once per rank.
        parts = [read(theirs) for theirs in hugging_face_names(name)]
        full = fuse_qkv(parts, head_dim) if len(parts) == 3 else parts[0]
        if name == "embedding.word_embeddings.weight":
            full = _pad_vocabulary(full, model.vocab_size, folder)
        copy_full_tensor(parameter, full, layout.tensor_rank, layout.tensor_size)


def open_tensors(folder: Path) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor by its name without the `model.` prefix that some files
    carry."""
    stem, suffix = _find_format(folder)
    index = folder / f"{stem}{suffix}.index.json"
    # A model of one file has no index.
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.is_file()
        else [stem + suffix]
    )
    places: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {file}, which its index names: copy the folder again")
        places.update(_readers(path))
    places = {name.removeprefix("model."): reader for name, reader in places.items()}

    def read(name: str) -> Tensor:
        """One whole tensor, read from its file now."""
        if name not in places:
            raise ValueError(
                f"{folder} has no tensor {name}: it is not a whole OPT model ({len(places)} tensors found); "
                "check that every weight file was copied"
            )
        return places[name]()

    return read


def _find_format(folder: Path) -> tuple[str, str]:
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if any((folder / f"{stem}{suffix}{index}").is_file() for index in ("", ".index.json")):
            return stem, suffix
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin (nor their index files): "
        "name a folder with Hugging Face OPT weights"
    )


def _readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    if path.suffix == ".safetensors":
        # Optional: folders with .bin files need no safetensors.
        from safetensors import safe_open

        opened = safe_open(path, framework="pt")
        return {name: lambda name=name: opened.get_tensor(name) for name in opened.keys()}  # type: ignore[misc]  # noqa: SIM118
    # weights_only: a pickle from elsewhere must not run code.
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {name: lambda tensor=tensor: tensor for name, tensor in state.items()}  # type: ignore[misc]


def check_shape(folder: Path, model: ModelConfig) -> None:
    """Refuse a folder whose model is of another size, or post-norm as OPT-350m."""
    theirs: dict[str, Any] = json.loads((folder / "config.json").read_text())
    # Files may leave both out, which means the default: pre-norm, and no projection.
    projected = theirs.get("word_embed_proj_dim") not in (None, theirs["hidden_size"])
    if projected or not theirs.get("do_layer_norm_before", True):
        raise ValueError(
            f"{folder} is OPT-350m's variant (post-norm, projected embedding), which is not supported: "
            "use another size of the family"
        )
    pairs = {
        "num_layers": (model.num_layers, theirs["num_hidden_layers"]),
        "hidden_size": (model.hidden_size, theirs["hidden_size"]),
        "num_attention_heads": (model.num_attention_heads, theirs["num_attention_heads"]),
        "ffn_hidden_size": (model.ffn_hidden_size, theirs["ffn_dim"]),
        "max_position_embeddings": (model.max_position_embeddings, theirs["max_position_embeddings"]),
    }
    wrong = [f"{name} {got} here, {there} there" for name, (got, there) in pairs.items() if got != there]
    if wrong:
        raise ValueError(
            f"checkpoint.initial_weights {folder} is a model of another size: {'; '.join(wrong)}. "
            "Set the model section (or model.size) to the checkpoint's"
        )


def _pad_vocabulary(full: Tensor, rows: int, folder: Path) -> Tensor:
    """Zero rows up to the vocabulary here; a larger vocabulary there is a mistake."""
    if full.shape[0] > rows:
        raise ValueError(
            f"{folder} has {full.shape[0]} embedding rows but model.vocab_size is {rows}: "
            f"set model.vocab_size={full.shape[0]}"
        )
    return torch.nn.functional.pad(full, (0, 0, 0, rows - full.shape[0]))
