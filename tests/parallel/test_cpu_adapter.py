"""Where there is no CUDA, the CPU answers for it in every way megatron-core asks."""

import subprocess
import sys

import pytest
import torch

from megatron_iml.parallel.cpu_adapter import install_cpu_adapter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the adapter does nothing")


@pytest.fixture(autouse=True)
def adapter() -> None:
    install_cpu_adapter()


def test_tensors_asked_for_on_cuda_are_on_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device="cuda:3").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 1)).device.type == "cpu"
    assert torch.ones(2).to("cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"


def test_cuda_is_the_identity_and_types_speak_of_cuda() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.half().type() == "torch.cuda.HalfTensor"
    assert tensor.type(torch.float64).dtype == torch.float64


def test_what_is_not_cuda_stays() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"


def test_the_generator_is_the_cpus() -> None:
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.default_generators[0].set_state(state)
    assert torch.equal(torch.rand(4), first)


def test_streams_and_synchronisation_do_nothing() -> None:
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.current_stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())


def test_installing_twice_is_installing_once() -> None:
    before = len(torch.overrides._get_current_function_mode_stack())
    install_cpu_adapter()
    assert len(torch.overrides._get_current_function_mode_stack()) == before


def test_nothing_is_patched_before_it_is_asked_for() -> None:
    program = "import torch, megatron_iml.parallel.groups; torch.cuda.current_device()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0 and "CUDA" in result.stderr
