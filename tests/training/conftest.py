from tests.training.setup import quantized  # noqa: F401 (a fixture)
