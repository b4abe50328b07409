"""What an error of a library says, in one line."""


def first_line(error: Exception) -> str:
    """Its first line without the full stop; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
