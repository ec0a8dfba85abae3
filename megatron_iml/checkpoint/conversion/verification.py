"""Compares the logits of two sets of weights on fixed prompts, one layer in memory at a time.

    check_same_logits(open_source(original), open_source(converted), exactly=True)

Each format is read the way its own code reads it, by its own tensor names and order of query, key and value,
not through `parameter_map`: a wrong rule there would undo itself on the way back, but not here. The forward
is plain fp32, the same for both, so equal weights give equal logits, bit for bit.

Shapes: S prompts, T tokens, F features, H heads, D head size, V vocabulary rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu, scaled_dot_product_attention

from megatron_iml.checkpoint.conversion.sources.hugging_face import HuggingFaceSource
from megatron_iml.checkpoint.conversion.sources.metaseq import MetaseqSource
from megatron_iml.checkpoint.conversion.sources.native import NativeSource
from megatron_iml.config.sizes import POSITION_OFFSET

from .formats import open_source
from .parameter_map import parameters
from .source import Source

PROMPTS, LENGTH = 3, 24
BLOCK_ROWS = 2048
"""Rows of a matrix that are in fp32 at a time: a whole one of 175B would have 2.4 GB."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer's tensors, each read when it is asked for."""

    norms: Callable[[str], Tensor]
    """attention_weight, attention_bias, feed_forward_weight, feed_forward_bias."""
    projection: Callable[[str, str], Tensor]
    """("query" | "key" | "value" | "output" | "fc1" | "fc2", "weight" | "bias")."""


def check_same_logits(source: Source, converted: Source, exactly: bool, tolerance: float = 0.0) -> float:
    """Run both on the same prompts; returns the largest difference over the spread of the logits.

    Args:
        source: the weights that were converted.
        converted: what they became.
        exactly: whether every logit must be the same number.
        tolerance: otherwise, the largest allowed return value.

    Raises:
        ValueError: if the logits differ by more.
    """
    # Rows that pad one of the vocabularies have no counterpart in the other.
    rows = min(source.model.vocab_size, converted.model.vocab_size)
    length = min(LENGTH, source.model.max_position_embeddings)
    generator = torch.Generator().manual_seed(1)
    tokens_ST = torch.randint(rows, (PROMPTS, length), generator=generator)
    ours, theirs = (logits(one, tokens_ST)[..., :rows] for one in (converted, source))
    # Relative to the spread: logits of models of different sizes differ in scale.
    difference = ((ours - theirs).abs().max() / theirs.std()).item()
    if not (torch.equal(ours, theirs) if exactly else difference <= tolerance):
        raise ValueError(
            f"{converted.path} gives other logits than {source.path}: they differ by {difference:.3g} of "
            f"their spread; allowed: {0 if exactly else tolerance}; the conversion is wrong, please report it"
        )
    return difference


def verifier(source: Source, dtype: torch.dtype | None) -> Callable[[Path], None]:
    """A check of a converted folder against its source: exact, or within what rounding to `dtype` may do."""

    def verify(folder: Path) -> None:
        """Raise if the folder's logits are not the source's."""
        converted = open_source(folder, source.model.num_attention_heads)
        # Errors of half an ulp, gathered over a few dozen layers; a swapped tensor gives differences of 1.
        tolerance = 0.0 if dtype is None else 32 * torch.finfo(dtype).eps
        check_same_logits(source, converted, dtype is None, tolerance)

    return verify


def logits(source: Source, tokens_ST: Tensor) -> Tensor:
    """OPT's forward [S, T, V]."""
    layers, whole = _reader(source)
    words_VF = whole("words")
    positions_TF = whole("positions")[POSITION_OFFSET:][: tokens_ST.shape[1]]
    # Looked up before the cast: the table in fp32 would be the largest thing in memory.
    hidden = words_VF[tokens_ST].float() + positions_TF.float()
    # [S, T, F] throughout.
    heads = source.model.num_attention_heads
    for layer in layers:
        hidden = hidden + _attention(layer, hidden, heads)
        normed = _norm(layer, hidden, "feed_forward")
        hidden = hidden + _apply(layer, "fc2", relu(_apply(layer, "fc1", normed)))
    normed = layer_norm(hidden, hidden.shape[-1:], whole("norm_weight").float(), whole("norm_bias").float())
    return _linear(normed, words_VF)


def _norm(layer: Layer, hidden: Tensor, place: str) -> Tensor:
    weight, bias = (layer.norms(f"{place}_{kind}").float() for kind in ("weight", "bias"))
    return layer_norm(hidden, hidden.shape[-1:], weight, bias)


def _apply(layer: Layer, name: str, hidden: Tensor) -> Tensor:
    return _linear(hidden, layer.projection(name, "weight")) + layer.projection(name, "bias").float()


def _linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """In fp32, whatever the weight's type, some rows of it at a time."""
    return torch.cat([linear(hidden, rows.float()) for rows in weight.split(BLOCK_ROWS)], -1)


def _attention(layer: Layer, hidden: Tensor, heads: int) -> Tensor:
    normed = _norm(layer, hidden, "attention")
    # [S, H, T, D]
    q, k, v = (
        _apply(layer, name, normed).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    # Scaled by 1 / sqrt(D), as torch does by itself and OPT does with the queries.
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return _apply(layer, "output", mixed)


def _reader(source: Source) -> tuple[Iterator[Layer], Callable[[str], Tensor]]:
    if isinstance(source, HuggingFaceSource):
        return _hugging_face(source)
    if isinstance(source, MetaseqSource):
        return _metaseq(source)
    assert isinstance(source, NativeSource), f"no forward for {source.kind}"
    return _native(source)


_OPT_NORMS = {"attention": "self_attn_layer_norm", "feed_forward": "final_layer_norm"}
_OPT_LINEARS = {"output": "self_attn.out_proj", "fc1": "fc1", "fc2": "fc2"}


def _hugging_face(source: HuggingFaceSource) -> tuple[Iterator[Layer], Callable[[str], Tensor]]:
    """As OPTDecoderLayer of transformers names and uses them."""
    outside = {
        "words": "decoder.embed_tokens.weight",
        "positions": "decoder.embed_positions.weight",
        "norm_weight": "decoder.final_layer_norm.weight",
        "norm_bias": "decoder.final_layer_norm.bias",
    }

    def layer(begin: str) -> Layer:
        """Readers of the layer whose names begin so."""

        def norms(name: str) -> Tensor:
            """Of transformers' names."""
            place, kind = name.rsplit("_", 1)
            return source.raw(f"{begin}.{_OPT_NORMS[place]}.{kind}")

        def projection(name: str, kind: str) -> Tensor:
            """A matrix of its own for each."""
            # query, key and value by their first letter: q_proj, k_proj, v_proj.
            module = _OPT_LINEARS.get(name, f"self_attn.{name[0]}_proj")
            return source.raw(f"{begin}.{module}.{kind}")

        return Layer(norms, projection)

    layers = (layer(f"decoder.layers.{number}") for number in range(source.model.num_layers))
    return layers, lambda name: source.raw(outside[name])


def _metaseq(source: MetaseqSource) -> tuple[Iterator[Layer], Callable[[str], Tensor]]:
    """As metaseq's model-parallel decoder uses them: every rank's qkv_proj gives keys, values, queries."""
    outside = {
        "positions": "decoder.embed_positions.weight",
        "norm_weight": "decoder.layer_norm.weight",
        "norm_bias": "decoder.layer_norm.bias",
    }

    def layer(begin: str) -> Layer:
        """Readers of the layer whose names begin so."""

        def norms(name: str) -> Tensor:
            """The first rank's: every rank has a copy."""
            place, kind = name.rsplit("_", 1)
            return source.raw(f"{begin}.{_OPT_NORMS[place]}.{kind}")[0]

        def projection(name: str, kind: str) -> Tensor:
            """One whole projection, put together from its ranks."""
            if name in ("query", "key", "value"):
                ranks = source.raw(f"{begin}.self_attn.qkv_proj.{kind}")
                third = ("key", "value", "query").index(name)
                # Ranks hold consecutive heads.
                return torch.cat([rank.chunk(3)[third] for rank in ranks])
            ranks = source.raw(f"{begin}.{_OPT_LINEARS[name]}.{kind}")
            # Column-parallel: outputs are cut, and their biases with them.
            if name == "fc1":
                return torch.cat(ranks)
            # Row-parallel: inputs are cut, and the bias is added once, by all from the same copy.
            return torch.cat(ranks, 1) if kind == "weight" else ranks[0]

        return Layer(norms, projection)

    def whole(name: str) -> Tensor:
        """What lies outside of layers."""
        # Rows of words are cut over ranks, all else each rank has whole.
        if name == "words":
            return torch.cat(source.raw("decoder.embed_tokens.weight"))
        return source.raw(outside[name])[0]

    layers = (layer(f"decoder.layers.{number}") for number in range(source.model.num_layers))
    return layers, whole


def _native(source: NativeSource) -> tuple[Iterator[Layer], Callable[[str], Tensor]]:
    """As `model/layer.py` uses them: per head, query, key and value."""
    # To name tensors for `read` only: the table's rules for other formats are not used.
    table = parameters(source.model)
    outside = {
        "words": "embedding.word_embeddings.weight",
        "positions": "embedding.position_embeddings.weight",
        "norm_weight": "decoder.final_layernorm.weight",
        "norm_bias": "decoder.final_layernorm.bias",
    }
    places = {"attention": "input_layernorm", "feed_forward": "pre_mlp_layernorm"}
    linears = {"output": "self_attention.linear_proj", "fc1": "mlp.linear_fc1", "fc2": "mlp.linear_fc2"}

    def layer(begin: str) -> Layer:
        """Readers of the layer whose names begin so."""

        def norms(name: str) -> Tensor:
            """Of our names."""
            place, kind = name.rsplit("_", 1)
            return source.read(table[f"{begin}.{places[place]}.{kind}"])

        def projection(name: str, kind: str) -> Tensor:
            """Query, key and value taken out of the fused one."""
            if name in ("query", "key", "value"):
                fused = source.read(table[f"{begin}.self_attention.linear_qkv.{kind}"])
                # [H, (query, key, value), D, F], a bias without the F.
                heads = fused.reshape(source.model.num_attention_heads, 3, -1, *fused.shape[1:])
                return heads[:, ("query", "key", "value").index(name)].flatten(0, 1)
            return source.read(table[f"{begin}.{linears[name]}.{kind}"])

        return Layer(norms, projection)

    layers = (layer(f"decoder.layers.{number}") for number in range(source.model.num_layers))
    return layers, lambda name: source.read(table[outside[name]])
