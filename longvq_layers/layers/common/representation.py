"""`repr` of layers."""


def call_repr(positional: tuple, **keywords: object) -> str:
    """The arguments of a call as Python would read them back."""
    return ", ".join([repr(value) for value in positional] + [f"{name}={value!r}" for name, value in keywords.items()])
