"""Layers on documents packed into one row: each document has the output that it has alone."""

import copy
import itertools

import pytest
import torch

from longvq_layers.layers import Codebook, CodebookAttention
from tests.layers.cases import BARE, LAYERS, WIDTH, trained
from tests.tolerances import assert_close

OFFSETS = torch.tensor([0, 9, 9, 10, 31, 40], dtype=torch.int32)
SPANS = [slice(start, end) for start, end in itertools.pairwise(OFFSETS.tolist())]

each_layer = pytest.mark.parametrize("name", LAYERS)
each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@each_layer
@each_direction
@pytest.mark.parametrize("masked", [False, True])
def test_each_document_equals_itself_alone_with_gradients(name, causal, masked):
    layer = trained(name, causal=causal, dtype=torch.float64)
    x = torch.randn(1, 40, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 40) < 0.3 if masked else None
    leaves, onto = [x, *layer.parameters()], torch.randn(1, 40, WIDTH, dtype=torch.float64)

    def alone():
        return torch.cat([layer(x[:, at], None if mask is None else mask[:, at]) for at in SPANS], dim=1)

    pairs = []
    for y in (layer(x, mask, cu_seqlens=OFFSETS), alone()):
        pairs.append([y, *torch.autograd.grad(y, leaves, onto)])
    for i, (a, b) in enumerate(zip(*pairs, strict=True)):
        assert_close(a, b, f"result {i}")
    assert (pairs[0][0] - layer(x, mask)).abs().max() > 1e-3  # without cu_seqlens the documents see each other


@pytest.mark.parametrize("name", ["ssm", "s4d"])
def test_each_document_has_a_state_of_its_own(name):
    layer = trained(name, causal=True)
    x, start = torch.randn(1, 40, WIDTH), torch.randn(5, WIDTH, 4, dtype=torch.complex64)
    y, state = layer(x, cu_seqlens=OFFSETS, initial_state=start, return_state=True)
    assert state.shape == start.shape
    for n, at in enumerate(SPANS):
        alone = layer(x[:, at], initial_state=start[n : n + 1], return_state=True)
        assert_close(y[:, at], alone[0], "y")
        assert_close(state[n : n + 1], alone[1], "state")


@pytest.mark.parametrize("name", ["vq", "vq_exact"])
def test_the_codebook_learns_from_the_whole_row(name):
    """The codebook learns from single keys, so documents make no difference to it."""
    layer, x = LAYERS[name](), torch.randn(1, 40, WIDTH)
    other = copy.deepcopy(layer)
    for _ in range(3):
        torch.manual_seed(1)
        layer(x, cu_seqlens=OFFSETS)
        torch.manual_seed(1)
        other(x)
    assert int(layer.codebook.steps) == 3
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(layer.attention.last_commitment, other.attention.last_commitment)


@each_layer
def test_bad_offsets_are_named_before_anything_is_learned(name):
    layer = LAYERS[name]()
    before = copy.deepcopy(layer.state_dict())
    x, who, argument = torch.randn(1, 40, WIDTH), type(layer).__name__, "u" if name in BARE else "x"
    with pytest.raises(ValueError, match=f"{who}: cu_seqlens must end with the length L = 40, got 31"):
        layer(x, cu_seqlens=OFFSETS[:-1])
    with pytest.raises(TypeError, match=f"{who}: cu_seqlens must be int32"):
        layer(x, cu_seqlens=OFFSETS.long())
    with pytest.raises(ValueError, match=f"{who}: {argument} must have a batch of 1 with cu_seqlens, .* got 2"):
        layer(x.expand(2, -1, -1), cu_seqlens=OFFSETS)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_bad_offsets_are_named_by_the_core_too():
    core = CodebookAttention(2, 2, 4, num_codes=3)
    q = torch.randn(1, 2, 40, 4)
    with pytest.raises(ValueError, match="CodebookAttention: cu_seqlens must end with the length L = 40, got 31"):
        core(q, q, q, cu_seqlens=OFFSETS[:-1])
    assert not any(bool(book.initialized) for book in core.modules() if isinstance(book, Codebook))


@pytest.mark.parametrize("name", ["vq", "s4d", "longvq"])  # compiling takes seconds
def test_compiled_equals_eager(name):
    layer = trained(name)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(1, 40, WIDTH)
    results = []
    for call in (compiled, layer):
        layer.zero_grad()
        y = call(x, cu_seqlens=OFFSETS)
        y.square().mean().backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, "compiled")
