"""--verify: equal weights pass bit for bit, a conversion that mixes tensors up does not appear."""

import converter
import foreign_checkpoints as foreign
import numpy as np
import pytest
import torch

from megatron_iml.checkpoint.conversion import parameter_map
from megatron_iml.checkpoint.conversion.formats import open_source
from megatron_iml.checkpoint.conversion.targets import metaseq as metaseq_target
from megatron_iml.checkpoint.conversion.targets import native as native_target
from megatron_iml.checkpoint.conversion.verification import check_same_logits, logits

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("form", ["hugging-face", "native", "metaseq"])
def test_the_forward_is_that_of_transformers(tmp_path, form) -> None:
    state = foreign.random_opt(dtype=torch.float32)
    foreign.write_hugging_face(tmp_path / "in", state)
    options = {"native": ("--inference-prefix", "none"), "metaseq": ("--parts", "2")}.get(form, ())
    assert converter.run(form, tmp_path / "in", tmp_path / "out", *options) == 0
    tokens = torch.randint(
        4, foreign.VOCAB, (2, foreign.POSITIONS), generator=torch.Generator().manual_seed(1)
    )
    ours = logits(open_source(tmp_path / "out", foreign.HEADS), tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    with torch.no_grad():
        theirs = model(tokens).logits
    # fp32 rounding of two layers; logits are of the order of 5.
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-4)


def swap_first_two(original):
    def swapped(parts, head_dim):
        query, key, value = parts
        return original((key, query, value), head_dim)

    return swapped


def test_a_wrong_rule_that_would_undo_itself_is_found(tmp_path, monkeypatch, capsys) -> None:
    foreign.write_hugging_face(tmp_path / "in", foreign.random_opt())
    wrong = swap_first_two(parameter_map.fuse_qkv)
    monkeypatch.setattr("megatron_iml.checkpoint.conversion.sources.hugging_face.fuse_qkv", wrong)
    options = ("--inference-prefix", "none", "--verify")
    assert converter.run("native", tmp_path / "in", tmp_path / "out", *options) == 2
    assert "gives other logits than" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [native_target, metaseq_target])
def test_tensors_of_one_shape_that_change_places_are_found(tmp_path, monkeypatch, capsys, module) -> None:
    """The two norms of a layer."""
    foreign.write_hugging_face(tmp_path / "in", foreign.random_opt())
    form = "native" if module is native_target else "metaseq"
    options = ("--inference-prefix", "none") if form == "native" else ()
    build = getattr(module, f"{form}_target")

    def exchanged(*arguments):
        target = build(*arguments)
        table = parameter_map.parameters(target.model)

        def pieces(parameter, full):
            name = parameter.name
            for one, other in (
                ("input_layernorm", "pre_mlp_layernorm"),
                ("pre_mlp_layernorm", "input_layernorm"),
            ):
                if one in name:
                    return target.pieces(table[name.replace(one, other)], full)
            return target.pieces(parameter, full)

        return type(target)(**{**vars(target), "pieces": pieces})

    monkeypatch.setattr(module, f"{form}_target", exchanged)
    assert converter.run(form, tmp_path / "in", tmp_path / "out", *options, "--verify") == 2
    assert "gives other logits than" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounding_is_within_its_bound(tmp_path, dtype) -> None:
    foreign.write_hugging_face(tmp_path / "in", foreign.random_opt(layers=6, dtype=torch.float32, std=0.1))
    assert converter.run("hugging-face", tmp_path / "in", tmp_path / "out", "--dtype", dtype, "--verify") == 0
    source, rounded = open_source(tmp_path / "in"), open_source(tmp_path / "out")
    with pytest.raises(ValueError, match="gives other logits"):
        check_same_logits(source, rounded, exactly=True)
    epsilon = 2.0**-10 if dtype == "fp16" else 2.0**-7
    assert check_same_logits(source, rounded, exactly=False, tolerance=32 * epsilon) > 0
