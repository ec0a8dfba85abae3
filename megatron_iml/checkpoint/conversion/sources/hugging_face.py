"""Reads a Hugging Face OPT folder, tensor by tensor.

What enters: a folder with `config.json` and safetensors or .bin files, sharded or not, with or without the
prefix `model.` and with or without the tied head. What leaves: whole tensors in our layout.

    source = HuggingFaceSource(Path("opt-125m"))
    source.read(parameters(source.model)["decoder.layers.0.mlp.linear_fc1.weight"])     # [3072, 768]
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iml.checkpoint.conversion.files.stored_tensor import MappedFile, StoredTensor, read_safetensors
from megatron_iml.checkpoint.conversion.files.torch_archive import named, read_archive
from megatron_iml.checkpoint.conversion.manifest import read_checksums
from megatron_iml.checkpoint.conversion.parameter_map import WORD_EMBEDDING, Parameter, fuse_qkv, parameters
from megatron_iml.checkpoint.conversion.source import Prefix, check_complete, check_heads, same_dtype
from megatron_iml.config import ModelConfig
from megatron_iml.data.text_files import json_object

HEAD = "lm_head.weight"
SHAPE_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "ffn_dim",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
REQUIRED_FIELDS: dict[str, Any] = {
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "tie_word_embeddings": True,
}
"""Fields that make another architecture; a file may leave them out, which means these values."""


def read_model_config(folder: Path) -> ModelConfig:
    """The model's shape, from config.json.

    Raises:
        ValueError: if it is no OPT, or OPT-350m's variant.
    """
    path = folder / "config.json"
    theirs = json_object(path)
    if theirs.get("model_type") != "opt":
        raise ValueError(
            f"{path}: model_type is {theirs.get('model_type')!r}; allowed: 'opt'; name a folder of an OPT"
        )
    lacking = [name for name in SHAPE_FIELDS.values() if name not in theirs]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: copy the model's own config.json")
    # Before the fields below, whose messages would not say which model this is.
    projected = theirs.get("word_embed_proj_dim") not in (None, theirs["hidden_size"])
    if projected or not theirs.get("do_layer_norm_before", True):
        raise ValueError(
            f"{folder} is OPT-350m's variant (post-norm, projected embedding), which is not supported: "
            "use another size of the family"
        )
    for field, value in REQUIRED_FIELDS.items():
        if theirs.get(field, value) != value:
            raise ValueError(
                f"{path}: {field} is {theirs[field]!r}; allowed: {value!r}, as in every OPT but 350m"
            )
    model = ModelConfig(**{ours: theirs[name] for ours, name in SHAPE_FIELDS.items()})
    check_heads(str(path), model)
    return model


class HuggingFaceSource:
    """Weights of a Hugging Face OPT folder."""

    kind = "Hugging Face"

    def __init__(self, path: Path) -> None:
        """Open the folder and check names and shapes.

        Raises:
            FileNotFoundError: a weight file is missing.
            ValueError: a tensor is missing, extra or misshapen, or a file truncated.
        """
        self.path, self.model, self.prefix = path, read_model_config(path), _prefix(path)
        self.files, self._tensors = _open_files(path)
        expected = {
            name: shape
            for parameter in parameters(self.model).values()
            for name, shape in _shapes(parameter).items()
        }
        # The tied head may be there or not; it is compared with the embedding when that is read.
        found = {name: tensor.shape for name, tensor in self._tensors.items() if name != HEAD}
        check_complete(str(path), expected, found)
        self._check_head()

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type of a tensor."""
        parts = [self._tensors[name].dtype for name in parameter.hugging_face]
        return same_dtype(str(self.path), parameter.name, parts)

    def read(self, parameter: Parameter) -> Tensor:
        """One whole tensor in our layout."""
        # Views on the files: fusing three matrices makes the one copy.
        parts = [self._tensors[name].read() for name in parameter.hugging_face]
        head_dim = self.model.hidden_size // self.model.num_attention_heads
        full = fuse_qkv(parts, head_dim) if parameter.is_qkv else parts[0]
        has_head = parameter.name == WORD_EMBEDDING and HEAD in self._tensors
        # Another head would be lost: here the embedding is the head.
        if has_head and not torch.equal(self._tensors[HEAD].read(), full):
            raise ValueError(
                f"{self.path}: tensor {HEAD} differs from {parameter.hugging_face[0]}; allowed: a tied head, "
                "as in every OPT; this model cannot be represented"
            )
        return full

    def raw(self, name: str) -> Tensor:
        """A tensor by its name in the files, without the prefix `model.`."""
        return self._tensors[name].read()

    def _check_head(self) -> None:
        if HEAD in self._tensors:
            rows = (self.model.vocab_size, self.model.hidden_size)
            check_complete(str(self.path), {HEAD: rows}, {HEAD: self._tensors[HEAD].shape})


def _shapes(parameter: Parameter) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that one of ours is made of."""
    share = len(parameter.hugging_face)
    shape = (parameter.shape[0] // share, *parameter.shape[1:])
    return dict.fromkeys(parameter.hugging_face, shape)


def _prefix(folder: Path) -> Prefix | None:
    """What the tokenizer puts before a prompt, if the folder has one."""
    # An option of GPT-2's tokenizer, which OPT uses; the token it adds is OPT's bos, </s>.
    path = folder / "tokenizer_config.json"
    if not path.is_file() or "add_bos_token" not in (settings := json_object(path)):
        return None
    return "eos" if settings["add_bos_token"] else "none"


def _open_files(folder: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """Map every weight file; names lose the prefix `model.`, which some files carry."""
    stem, suffix = _find_format(folder)
    index_path = folder / f"{stem}{suffix}.index.json"
    # A model of one file has no index.
    index = _read_index(index_path) if index_path.is_file() else {}
    names = sorted(set(index.values())) or [stem + suffix]
    checksums = read_checksums(folder)
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its index names: copy the folder again")
        # Archives of torch have checksums of their own.
        if path.suffix == ".safetensors":
            here = read_safetensors(MappedFile(path), checksums.get(name, {}))
        else:
            here = _state_dict(path)
        # Both ways: a file that holds another's tensors, and one that lacks its own.
        astray = [tensor for tensor in here if index.get(tensor, name) != name]
        astray += [tensor for tensor in index if index[tensor] == name and tensor not in here]
        if astray:
            raise ValueError(
                f"{path}: its tensors are not those that {index_path.name} lists for it, first {astray[0]}: "
                "files of two models are mixed; copy the folder again"
            )
        tensors.update(here)
    return [folder / name for name in names], {
        name.removeprefix("model."): tensor for name, tensor in tensors.items()
    }


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file."""
    files = json_object(path).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{path} has no weight_map, which says what file a tensor is in: copy it again")
    return files


def _state_dict(path: Path) -> dict[str, StoredTensor]:
    saved = read_archive(MappedFile(path))
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds a {type(saved).__name__}; allowed: a state dict; name a model's file")
    return named(saved)


def _find_format(folder: Path) -> tuple[str, str]:
    # safetensors first, where a folder has both: its header is checked, and nothing is unpickled.
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if any((folder / f"{stem}{suffix}{index}").is_file() for index in ("", ".index.json")):
            return stem, suffix
    raise FileNotFoundError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin (nor their index files): "
        "name a folder with Hugging Face OPT weights"
    )
