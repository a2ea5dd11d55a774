"""Words for people."""


def counted(number: int, noun: str) -> str:
    """A number of things: 1 tile, 2 tiles, 2 classes, 2 queries."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
