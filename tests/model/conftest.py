import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Two cores are shared; and a test's result must not depend on the tests before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
