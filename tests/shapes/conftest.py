import pytest

from dina_reward.shapes import load_pipeline


@pytest.fixture(scope="session")
def shapes_pipeline():
    return load_pipeline()
