"""Lays out a Hugging Face OPT folder that `transformers` loads, with tokenizer and generation settings.

    target = hugging_face_target(model, dtypes, HuggingFaceOptions(tokenizer=Path("opt-tokenizer")))
    target.files        # {"model-00001-of-00003.safetensors": FilePlan, ...}
    target.texts        # config.json, generation_config.json, vocab.json, merges.txt, ...

The head is tied and has no tensor of its own, as transformers itself saves OPT.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_iml.checkpoint.conversion.files.plan import (
    FilePlan,
    TensorSpec,
    safetensors_file,
    torch_archive,
)
from megatron_iml.checkpoint.conversion.parameter_map import Parameter, groups, split_qkv
from megatron_iml.checkpoint.conversion.source import Prefix
from megatron_iml.checkpoint.conversion.sources.hugging_face import REQUIRED_FIELDS, SHAPE_FIELDS
from megatron_iml.checkpoint.conversion.target import Piece, Target
from megatron_iml.config import ModelConfig
from megatron_iml.data.corpus.tokenizer import Tokenizer, find_files

# Of OPT's vocabulary; 0 is <s>, which OPT does not use.
PAD_ID, EOS_ID = 1, 2
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class HuggingFaceOptions:
    """What a folder may look like."""

    container: Literal["safetensors", "bin"] = "safetensors"
    max_shard_bytes: int = 5_000_000_000
    """Largest weight file, unless one tensor is larger."""
    tokenizer: Path | None = None
    """Folder with vocab.json and merges.txt, to be copied."""
    prefix: Prefix = "none"
    """What the tokenizer puts before a prompt: nothing, or </s>."""


def hugging_face_target(
    model: ModelConfig, dtypes: Mapping[str, torch.dtype], options: HuggingFaceOptions
) -> Target:
    """Plan a folder of this model.

    Args:
        model: the shape.
        dtypes: type of every parameter.
        options: how it may look.

    Raises:
        ValueError: if the tokenizer has more entries than the embedding rows.
    """
    shards = _shards(model, dtypes, options.max_shard_bytes)
    files, file_of = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = _file_name(options.container, number, len(shards))
        file_of.update(dict.fromkeys(shard, name))
        files[name] = _file(shard, options.container)
    head_dim = model.hidden_size // model.num_attention_heads

    def pieces(parameter: Parameter, full: Tensor) -> Iterator[Piece]:
        """A matrix as it is, the fused projection as three."""
        parts = split_qkv(full, head_dim) if parameter.is_qkv else (full,)
        for name, part in zip(parameter.hugging_face, parts, strict=True):
            yield file_of[f"model.{name}"], f"model.{name}", part

    texts = {
        "config.json": _json(_config(model, dtypes)),
        "generation_config.json": _json(_generation(model, options)),
        **_tokenizer_files(model, options),
    }
    if len(shards) > 1:
        total = sum(spec.num_bytes for shard in shards for spec in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        texts[f"{_stem(options.container)}.index.json"] = _json(index)
    chosen = {"container": options.container, "max_shard_bytes": options.max_shard_bytes}
    return Target("Hugging Face", model, files, pieces, chosen, texts)


def _shards(
    model: ModelConfig, dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> list[dict[str, TensorSpec]]:
    """Tensors by file, in the table's order."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for _, group in groups(model):
        for parameter in group:
            # 1, or 3 for the fused projection, whose rows three matrices share evenly.
            share = len(parameter.hugging_face)
            shape = (parameter.shape[0] // share, *parameter.shape[1:])
            for name in parameter.hugging_face:
                spec = TensorSpec(dtypes[parameter.name], shape, f"model.{name}")
                # A tensor larger than a shard gets one of its own: cutting it no reader would understand.
                if shards[-1] and size + spec.num_bytes > max_bytes:
                    shards.append({})
                    size = 0
                shards[-1][spec.name] = spec
                size += spec.num_bytes
    return shards


def _file(shard: Mapping[str, TensorSpec], container: str) -> FilePlan:
    return safetensors_file(shard) if container == "safetensors" else torch_archive(dict(shard))


def _stem(container: str) -> str:
    return "model.safetensors" if container == "safetensors" else "pytorch_model.bin"


def _file_name(container: str, number: int, count: int) -> str:
    stem, suffix = _stem(container).split(".")
    return f"{stem}.{suffix}" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def _config(model: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **{theirs: vars(model)[ours] for ours, theirs in SHAPE_FIELDS.items()},
        **REQUIRED_FIELDS,
        # Another number would make transformers add OPT-350m's projections.
        "word_embed_proj_dim": model.hidden_size,
        # What transformers loads in when it is asked for `auto`.
        "torch_dtype": DTYPE_NAMES[dtypes["decoder.layers.0.mlp.linear_fc1.weight"]],
        # What further training with transformers would use.
        "dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "layerdrop": 0.0,
        "init_std": model.init_method_std,
        # As OPT's own files have it: a prompt begins with </s>.
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "use_cache": True,
    }


def _generation(model: ModelConfig, options: HuggingFaceOptions) -> dict[str, Any]:
    """Greedy, as evaluation generates here."""
    settings: dict[str, Any] = {
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "do_sample": False,
        # The default of evaluation.max_new_tokens.
        "max_new_tokens": 256,
    }
    if options.tokenizer is not None:
        entries = Tokenizer.load(options.tokenizer).vocab_size
        if entries > model.vocab_size:
            raise ValueError(
                f"--tokenizer-model {options.tokenizer}: has {entries} entries; allowed: at most the model's "
                f"{model.vocab_size} embedding rows; name the tokenizer that the model was trained with"
            )
        # Rows that only pad the vocabulary have logits too, and would win now and then.
        if entries < model.vocab_size:
            settings["suppress_tokens"] = list(range(entries, model.vocab_size))
    return settings


def _tokenizer_files(model: ModelConfig, options: HuggingFaceOptions) -> dict[str, bytes]:
    if options.tokenizer is None:
        return {}
    vocab, merges = find_files(options.tokenizer)
    # As in the tokenizers of OPT's published folders.
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model.max_position_embeddings,
        "add_bos_token": options.prefix == "eos",
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    return {
        "vocab.json": vocab.read_bytes(),
        "merges.txt": merges.read_bytes(),
        "special_tokens_map.json": _json(special),
        "tokenizer_config.json": _json(settings),
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
