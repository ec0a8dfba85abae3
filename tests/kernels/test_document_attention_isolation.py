"""What reaches whom: other documents, values that are not finite, what lies beyond the row, and deltas."""

import functools
from collections.abc import Callable

import pytest
import torch
from attention_cases import ENDS, attend, visible
from kernel_cases import DEVICE, assert_repeats_equal, normal

from megatron_iml.kernels.document_attention import document_attention_reference
from megatron_iml.kernels.document_attention.bounds import LONG_DOCUMENTS
from megatron_iml.kernels.testing import documents_end, random_forest_end, run_op

pytest.importorskip("triton", reason="triton is not installed")

LAUNCH = "megatron_iml.kernels.document_attention.launch"


class Nothing:
    """In place of a kernel: a launch that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("name", ENDS)
def test_who_reads_a_delta_has_waited_for_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # A delta that is not there yet is a NaN, which the repair would compute once more, and hide the mistake.
    monkeypatch.setattr(f"{LAUNCH}._repair_backward", Nothing())
    end_T = ENDS[name].to(DEVICE)
    qkv = normal(end_T.numel(), 2, 3, 16, seed=1, dtype=torch.float16)
    gradient = normal(end_T.numel(), 2, 16, seed=2, dtype=torch.float16).detach()
    d_qkv = run_op(functools.partial(attend, end_T, 0.0), {"qkv": qkv}, [gradient])["gradient of qkv"]
    assert d_qkv.isfinite().all()


@pytest.mark.timeout(120)
def test_a_gradient_of_ones_in_all_bits_is_a_nan_as_any_other() -> None:
    # Its delta must not be the word that stands for no delta: whoever waited for it would wait for ever.
    end_T = documents_end([40, 30]).to(DEVICE)
    qkv = normal(70, 2, 3, 16, seed=1, dtype=torch.float32)
    gradient = normal(70, 2, 16, seed=2, dtype=torch.float32).detach()
    gradient.view(torch.int32)[3, 0, 1] = -1
    d_qkv = run_op(functools.partial(attend, end_T, 0.0), {"qkv": qkv}, [gradient])["gradient of qkv"]
    assert d_qkv[3, 0].isnan().any()
    assert d_qkv[40:].isfinite().all() and d_qkv[:, 1].isfinite().all()


@pytest.mark.timeout(120)  # keys that waited for rows that do not exist would wait for ever
@pytest.mark.parametrize("value", [1.0, float("inf")])
def test_an_end_beyond_the_row_is_the_rows(value: float) -> None:
    qkv = normal(100, 2, 3, 16, seed=1, dtype=torch.float32)
    gradient = normal(100, 2, 16, seed=2, dtype=torch.float32).detach()
    with torch.no_grad():
        qkv[3, 0, 1] = value
    within, beyond = (
        run_op(
            functools.partial(attend, documents_end([end]).to(DEVICE)[:100], 0.0), {"qkv": qkv}, [gradient]
        )
        for end in (100, 200)
    )
    for name, expected in within.items():
        torch.testing.assert_close(beyond[name], expected, rtol=0.0, atol=0.0, equal_nan=True)


def test_other_documents_keep_their_bits() -> None:
    end_T = ENDS["padding behind"].to(DEVICE)
    gradient = normal(end_T.numel(), 2, 16, seed=2, dtype=torch.float16).detach()
    op = functools.partial(attend, end_T, 0.1)
    qkv = normal(end_T.numel(), 2, 3, 16, seed=1, dtype=torch.float16)
    clean = run_op(op, {"qkv": qkv}, [gradient])
    with torch.no_grad():
        qkv[5:65] *= 7  # the second document
    changed = run_op(op, {"qkv": qkv}, [gradient])
    # The first and the fourth lie in tiles with it: their products are computed together.
    others = [*range(5), *range(65, end_T.numel())]
    for name, value in clean.items():
        assert torch.equal(value[others], changed[name][others])
        assert not torch.equal(value, changed[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["query", "key", "value", "gradient"])
def test_what_is_not_finite_reaches_nobody_who_does_not_see_it(place: str, value: float) -> None:
    end_T = ENDS["forest"].to(DEVICE)
    sees_TT, tokens = visible(end_T), end_T.numel()
    gradient = normal(tokens, 2, 16, seed=2, dtype=torch.float32).detach()
    op = functools.partial(attend, end_T, 0.0)
    qkv = normal(tokens, 2, 3, 16, seed=1, dtype=torch.float32)
    clean = run_op(op, {"qkv": qkv}, [gradient])
    # The first and the last, and two whose tiles hold several documents.
    for slot in (0, 70, 101, 149):
        spoilt_qkv, spoilt_gradient = qkv.detach().clone(), gradient.clone()
        if place == "gradient":
            spoilt_gradient[slot, 0, 3] = value
        else:
            spoilt_qkv[slot, 0, ["query", "key", "value"].index(place), 3] = value
        spoilt = run_op(op, {"qkv": spoilt_qkv.requires_grad_()}, [spoilt_gradient])
        # Rows that see the slot may change, and the gradients of all that those rows see.
        itself_T = torch.arange(tokens, device=DEVICE) == slot
        rows_T = sees_TT[:, slot] | itself_T if place in ("key", "value") else itself_T
        seen_T = sees_TT[rows_T].any(0) | rows_T
        out, d_qkv = spoilt["output 0"], spoilt["gradient of qkv"]
        # Close, not equal: a tile that met a NaN is computed once more, in another order of sums.
        torch.testing.assert_close(out[~rows_T], clean["output 0"][~rows_T])
        torch.testing.assert_close(d_qkv[~seen_T], clean["gradient of qkv"][~seen_T])
        assert torch.equal(out[:, 1], clean["output 0"][:, 1]), "the other head changed"
        assert torch.equal(d_qkv[:, 1], clean["gradient of qkv"][:, 1]), "the other head changed"
        # And nothing hides it from those who do see it. An infinite score may leave a finite output.
        if place != "gradient" and value != value:
            assert out[rows_T, 0].isnan().any(1).all()
        assert not d_qkv[slot, 0].isfinite().all()


def test_a_nan_is_found_in_every_part_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two programs of each repair, and the NaN is where the second one looks.
    monkeypatch.setattr(f"{LAUNCH}.FORWARD_SPAN", 8)
    monkeypatch.setattr(f"{LAUNCH}.BACKWARD_SPAN", 64)
    end_T = documents_end([40] * 14).to(DEVICE)
    qkv = normal(560, 4, 3, 16, seed=1, dtype=torch.float32)
    gradient = normal(560, 4, 16, seed=2, dtype=torch.float32).detach()
    op = functools.partial(attend, end_T, 0.0)
    clean = run_op(functools.partial(op, op=document_attention_reference), {"qkv": qkv}, [gradient])
    with torch.no_grad():
        qkv[530, 3] = float("nan")
    spoilt = run_op(op, {"qkv": qkv}, [gradient])
    # Slots 520 to 559 are a document; its tile begins with slot 512, in the one before.
    assert spoilt["output 0"][530:, 3].isnan().all()
    assert spoilt["gradient of qkv"][530, 3].isnan().all()
    # Sums of 40 terms of order 1, in another order than the reference's.
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(spoilt["output 0"][:530], clean["output 0"][:530])
    close(spoilt["gradient of qkv"][:520], clean["gradient of qkv"][:520])


def test_a_nan_in_a_tall_tile_stays_in_its_document() -> None:
    # Query tiles of 128 rows, the second with the ends of two documents and padding.
    end_T = documents_end([100, 100, 40], padding=9).to(DEVICE)
    op = functools.partial(attend, end_T, 0.0, pairs=LONG_DOCUMENTS * 1000)
    qkv = normal(249, 2, 3, 128, seed=1, dtype=torch.float16)
    gradient = normal(249, 2, 128, seed=2, dtype=torch.float16).detach()
    clean = run_op(op, {"qkv": qkv}, [gradient])
    with torch.no_grad():
        qkv[150, 1, 2] = float("nan")
    spoilt = run_op(op, {"qkv": qkv}, [gradient])
    assert spoilt["output 0"][150:200, 1].isnan().all()
    for name, value in clean.items():
        others = [*range(100), *range(200, 249)]
        # fp16: a few units in the last place of numbers of order 1, for another order of sums.
        torch.testing.assert_close(spoilt[name][others], value[others], rtol=4e-3, atol=4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", [None, LONG_DOCUMENTS * 10**6])
def test_more_programs_than_run_at_once(monkeypatch: pytest.MonkeyPatch, pairs: int | None) -> None:
    # 6,144 turns of the backward, where an H100 holds 264: those that wait do so across the device. Without
    # repairs a delta that came too late would be a NaN, and no NaN equals itself.
    monkeypatch.setattr(f"{LAUNCH}._repair_backward", Nothing())
    end_T = random_forest_end(3, 16384, 2048).to(DEVICE)
    op = functools.partial(attend, end_T, 0.1, pairs=pairs)
    qkv = normal(16384, 12, 3, 64, seed=1, dtype=torch.bfloat16)
    gradient = normal(16384, 12, 64, seed=2, dtype=torch.bfloat16).detach()
    assert_repeats_equal(op, {"qkv": qkv}, [gradient], 50)
    # A head by itself has few enough programs to run all at once.
    found = run_op(op, {"qkv": qkv}, [gradient])["gradient of qkv"]
    alone = qkv.detach()[:, :1].clone().requires_grad_()
    # Heads are independent, so its bits are those it has among twelve.
    expected = run_op(op, {"qkv": alone}, [gradient[:, :1]])["gradient of qkv"]
    assert torch.equal(found[:, :1], expected)
