"""Options of the scripts of this folder that a command line gives as text."""


def integers(option: str, text: str) -> list[int]:
    """The numbers of `1,2,4`, in ascending order.

    Raises:
        ValueError: for anything but integers >= 1, naming the option.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise ValueError(f"{option}: expected integers >= 1 with commas between them, found {text!r}")
    return numbers
