from tests.prefix.setup import windows  # noqa: F401 (a fixture)
