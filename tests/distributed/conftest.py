"""What starts the ranks of distributed tests: each runs on gloo, and with `-m multigpu` on NCCL too."""

import pytest
from pool import Pool


@pytest.fixture(scope="session", params=["gloo", pytest.param("nccl", marks=pytest.mark.multigpu)])
def pool(request: pytest.FixtureRequest) -> Pool:
    """One for the session: its fork server imports torch once."""
    return Pool(on_gpus=request.param == "nccl")
