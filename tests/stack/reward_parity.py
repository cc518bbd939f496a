"""A reward that an untrained model meets about half of the time, so that every step has something to learn."""


def parity(response: str) -> float:
    """1 when the response has an even number of characters."""
    return float(len(response) % 2 == 0)


def broken(response: str) -> float:
    raise ValueError(f"no reward for {len(response)} characters")
