"""What starts the ranks of distributed tests."""

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Pool:
    """One for the session: its fork server imports torch once."""
    return Pool()
