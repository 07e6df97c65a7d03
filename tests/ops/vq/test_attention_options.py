"""The options of the attention operator: one list in Python, one in C++."""

import re
from pathlib import Path

import pytest

from longvq_layers.ops._attention_options import Activation, AttentionOptions, KeyGrad, LocalKeys

HEADER = Path(__file__).parents[3] / "csrc" / "vq" / "attention_options.h"


@pytest.mark.parametrize("choices", [Activation, LocalKeys, KeyGrad])
def test_choices_have_the_values_that_they_have_in_cpp(choices):
    (body,) = re.findall(rf"enum class {choices.__name__} : int64_t {{(.*?)}};", HEADER.read_text())
    found = {name.upper(): int(value) for name, value in re.findall(r"k(\w+) = (\d+)", body)}
    assert found == {choice.name: choice.value for choice in choices}
    assert [choice.value for choice in choices] == list(range(len(choices)))  # the index of a public name is its value


def test_fields_are_those_of_the_struct():
    (body,) = re.findall(r"struct AttentionOptions {\n(.*?)\n\n", HEADER.read_text(), re.DOTALL)
    assert re.findall(r"(\w+);", body) == list(AttentionOptions._fields)
