"""Writers of other projects' checkpoints, made from the formats' descriptions alone; nothing of ours is used.

A model is a dict of tensors under Hugging Face's names without the prefix `model.`. metaseq's files are made
from it as metaseq's own training would leave them: parts of a model-parallel group, each with keys, values
and queries fused in that order; for training files flattened and padded over data-parallel ranks as fairscale
does.
"""

import argparse
import json
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

LAYERS, HIDDEN, HEADS, POSITIONS, VOCAB = 2, 32, 4, 16, 48


def random_opt(
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    positions: int = POSITIONS,
    dtype: torch.dtype = torch.float16,
    std: float = 0.2,
) -> dict[str, Tensor]:
    """Random weights; biases and norms too, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(layers * 1000 + hidden)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype)

    ffn = 4 * hidden
    state = {
        "decoder.embed_tokens.weight": normal(vocab, hidden),
        "decoder.embed_positions.weight": normal(positions + 2, hidden),
        "decoder.final_layer_norm.weight": normal(hidden, mean=1.0),
        "decoder.final_layer_norm.bias": normal(hidden),
    }
    for layer in range(layers):
        begin = f"decoder.layers.{layer}."
        for name in ("q", "k", "v", "out"):
            state[f"{begin}self_attn.{name}_proj.weight"] = normal(hidden, hidden)
            state[f"{begin}self_attn.{name}_proj.bias"] = normal(hidden)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            state[f"{begin}{name}.weight"] = normal(hidden, mean=1.0)
            state[f"{begin}{name}.bias"] = normal(hidden)
        state |= {f"{begin}fc1.weight": normal(ffn, hidden), f"{begin}fc1.bias": normal(ffn)}
        state |= {f"{begin}fc2.weight": normal(hidden, ffn), f"{begin}fc2.bias": normal(hidden)}
    return state


def opt_config(state: dict[str, Tensor], heads: int = HEADS) -> dict[str, object]:
    """What the published folders' config.json says."""
    vocab, hidden = state["decoder.embed_tokens.weight"].shape
    return {
        "_name_or_path": "opt",
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": len(state["decoder.layers.0.fc1.bias"]),
        "hidden_size": hidden,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": len(state["decoder.embed_positions.weight"]) - 2,
        "model_type": "opt",
        "num_attention_heads": heads,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name),
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": str(state["decoder.embed_tokens.weight"].dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": vocab,
        "word_embed_proj_dim": hidden,
    }


def write_hugging_face(
    folder: Path,
    state: dict[str, Tensor],
    safetensors: bool = True,
    prefix: str = "model.",
    head: bool = False,
    shards: int = 1,
    heads: int = HEADS,
) -> None:
    """A folder as the hub has them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(opt_config(state, heads)))
    named = {prefix + name: tensor for name, tensor in state.items()}
    if head:
        tied = named[prefix + "decoder.embed_tokens.weight"]
        # The library refuses tensors that share memory; torch keeps them shared.
        named["lm_head.weight"] = tied.clone() if safetensors else tied
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    names = sorted(named)
    parts = [{name: named[name] for name in names[shard::shards]} for shard in range(shards)]
    files = [
        f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        for number in range(shards)
    ]
    for part, file in zip(parts, files, strict=True):
        if safetensors:
            from safetensors.torch import save_file

            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        weight_map = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        total = sum(tensor.nbytes for tensor in named.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def metaseq_part(state: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    """The state dict of one rank of a model-parallel group."""
    own: dict[str, Tensor] = {"decoder.version": torch.tensor([3.0])}
    for name, tensor in state.items():
        if name in ("decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias"):
            own[name.replace("final_layer_norm", "layer_norm")] = tensor
        elif ".q_proj." in name:
            rows = slice(part * len(tensor) // parts, (part + 1) * len(tensor) // parts)
            kvq = [state[name.replace(".q_proj.", f".{which}_proj.")][rows] for which in "kvq"]
            own[name.replace(".q_proj.", ".qkv_proj.")] = torch.cat(kvq)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif name.endswith(("embed_tokens.weight", "fc1.weight", "fc1.bias")):
            own[name] = tensor.chunk(parts)[part].clone()
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            own[name] = tensor.chunk(parts, 1)[part].clone()
        else:
            own[name] = tensor.clone()
    return own


# The order of metaseq's modules: parameters are flattened in it.
LAYER_NAMES = (
    "self_attn.qkv_proj.weight",
    "self_attn.qkv_proj.bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
    "self_attn_layer_norm.weight",
    "self_attn_layer_norm.bias",
    "fc1.weight",
    "fc1.bias",
    "fc2.weight",
    "fc2.bias",
    "final_layer_norm.weight",
    "final_layer_norm.bias",
)
ROOT_NAMES = (
    "decoder.embed_tokens.weight",
    "decoder.embed_positions.weight",
    "decoder.layer_norm.weight",
    "decoder.layer_norm.bias",
)


def flatten(own: dict[str, Tensor], shards: int) -> list[dict[str, object]]:
    """What each data-parallel rank saves of one part: pieces of flat parameters, and what is in them."""
    layers = 1 + max(int(name.split(".")[2]) for name in own if ".layers." in name)
    modules = [("", ROOT_NAMES)] + [(f"decoder.layers.{layer}", LAYER_NAMES) for layer in range(layers)]
    saved: list[dict[str, object]] = [
        {
            "model": {"decoder.version": own["decoder.version"]},
            "shard_metadata": {
                "param_metadata": [],
                "buffer_names": ["decoder.version"],
                "shared_param_info": [],
            },
        }
        for _ in range(shards)
    ]
    for path, names in modules:
        full = [own[f"{path}.{name}" if path else name] for name in names]
        flat = torch.cat([tensor.flatten() for tensor in full])
        chunks = list(flat.chunk(shards))
        while len(chunks) < shards:
            chunks.append(flat.new_empty(0))
        for one, chunk in zip(saved, chunks, strict=True):
            padding = len(chunks[0]) - len(chunk)
            key = f"{path}.flat_param_0" if path else "flat_param_0"
            one["model"][key] = torch.nn.functional.pad(chunk, (0, padding)).clone()
            one["shard_metadata"]["param_metadata"].append(
                {
                    "fsdp_path": path,
                    "params": {
                        "flat_param_0": {
                            "names": list(names),
                            "shapes": [tensor.shape for tensor in full],
                            "numels": [tensor.numel() for tensor in full],
                            "padding": padding,
                        }
                    },
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [],
                }
            )
    return saved


class DictConfig:
    """Pickled under OmegaConf's name: nodes point to their parents and hold values in `_val`."""

    def __init__(self, content: dict[str, object], parent: object = None) -> None:
        self.__dict__["_content"] = content
        self.__dict__["_parent"] = parent


class AnyNode:
    """A leaf of OmegaConf's."""

    def __init__(self, value: object, parent: object) -> None:
        self.__dict__["_val"] = value
        self.__dict__["_parent"] = parent


def omegaconf(heads: int) -> DictConfig:
    """A configuration as metaseq saves it."""
    model = DictConfig({})
    model._content["decoder_attention_heads"] = AnyNode(heads, model)
    root = DictConfig({"model": model})
    model.__dict__["_parent"] = root
    return root


def save_as_metaseq(path: Path, saved: dict[str, object], heads: int, configuration: str) -> None:
    """`torch.save` with the classes that metaseq's files name, which the reader's process does not have."""
    if configuration == "omegaconf":
        module = types.ModuleType("omegaconf.dictconfig")
        vars(module).update(DictConfig=DictConfig, AnyNode=AnyNode)
        before = {cls: cls.__module__ for cls in (DictConfig, AnyNode)}
        sys.modules |= {"omegaconf": types.ModuleType("omegaconf"), "omegaconf.dictconfig": module}
        for cls in before:
            cls.__module__ = "omegaconf.dictconfig"
        try:
            torch.save({"cfg": omegaconf(heads), **saved}, path)
        finally:
            del sys.modules["omegaconf.dictconfig"], sys.modules["omegaconf"]
            for cls, name in before.items():
                cls.__module__ = name
    else:
        options = argparse.Namespace(decoder_attention_heads=heads, arch="transformer_lm_gpt")
        torch.save({"args": options, **saved}, path)


def write_metaseq(
    folder: Path,
    state: dict[str, Tensor],
    parts: int = 1,
    shards: int | None = None,
    heads: int = HEADS,
    configuration: str = "omegaconf",
) -> None:
    """A singleton, tensor-parallel parts without metadata, or training files."""
    folder.mkdir(parents=True)
    extra = {"extra_state": {"train_iterator": {"epoch": 1}}, "last_optimizer_state": {"state": {}}}
    for part in range(parts):
        own = metaseq_part(state, part, parts)
        if shards is None:
            name = "restored.pt" if parts == 1 else f"checkpoint_1_4000.pt-model_part-{part}.pt"
            save_as_metaseq(folder / name, {"model": own, **extra}, heads, configuration)
            continue
        for shard, saved in enumerate(flatten(own, shards)):
            name = f"checkpoint_last-model_part-{part}-shard{shard}.pt"
            save_as_metaseq(folder / name, {**saved, **extra}, heads, configuration)


def read_hugging_face(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors, read by the library, without the prefix."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        state |= torch.load(path, weights_only=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def read_metaseq(path: Path) -> dict[str, object]:
    """One file of ours, by torch's own reader; it holds plain data only."""
    return torch.load(path, weights_only=True)
