"""What is particular to the suffix monoid: counts that differ by row, widths beyond the sequence, exact gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmem.algebra import suffix
from jaxmem.algebra.suffix import Suffix

ROWS, PIECES, TOKENS, D = 3, 4, 3, 2
lengths = st.lists(st.lists(st.integers(0, TOKENS), min_size=ROWS, max_size=ROWS), min_size=PIECES, max_size=PIECES)
suffix_of = jax.jit(suffix.suffix_of, static_argnames="width")
combine, fold = jax.jit(suffix.combine), jax.jit(suffix.fold)

# sequences[n, r, t] is a number that no other token has, in both channels
numbers = 1 + np.arange(PIECES * ROWS * TOKENS, dtype=np.float32).reshape(PIECES, ROWS, TOKENS)
sequences = jnp.asarray(np.stack([numbers, -numbers], axis=-1))


def last_by_slicing(lengths, width):
    """Per row, the last `width` numbers of its pieces, left-padded with 0, and how many they are."""
    rows = [[x for n in range(PIECES) for x in numbers[n, r, : lengths[n][r]].tolist()][-width:] for r in range(ROWS)]
    return [[0.0] * (width - len(row)) + row for row in rows], [len(row) for row in rows]


@pytest.mark.parametrize("width", [1, 2, TOKENS, 5, 2 * PIECES * TOKENS])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=lengths)
def test_pieces_in_sequence_keep_what_slicing_keeps(width, lengths):
    pieces = suffix_of(sequences, width, jnp.array(lengths))
    items, count = last_by_slicing(lengths, width)
    one_by_one = functools.reduce(combine, map(Suffix, *pieces))
    for whole in (one_by_one, fold(pieces)):
        assert whole.items[..., 0].tolist() == items
        assert whole.items[..., 1].tolist() == (-np.array(items)).tolist()
        assert whole.count.tolist() == count


@jax.jit
@jax.grad
def gradient_of_the_kept(sequences, lengths):
    return jnp.sum(suffix.fold(suffix.suffix_of(sequences, 5, lengths)).items * jnp.array([1.0, 10.0]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=lengths)
def test_gradients_reach_the_survivors_and_only_them(lengths):
    gradient = gradient_of_the_kept(sequences, jnp.array(lengths))
    survivors = np.isin(numbers, last_by_slicing(lengths, 5)[0])
    assert gradient.tolist() == np.stack([1.0 * survivors, 10.0 * survivors], axis=-1).tolist()


@pytest.mark.parametrize("n_tokens", [0, 2, 4, 7])
def test_without_lengths_every_token_is_real(n_tokens):
    sequence = jnp.arange(1.0, 1 + 2 * n_tokens).reshape(2, n_tokens, 1)
    element = suffix.suffix_of(sequence, 4)
    kept = min(n_tokens, 4)
    np.testing.assert_array_equal(element.count, kept)
    np.testing.assert_array_equal(element.items[:, 4 - kept :], sequence[:, n_tokens - kept :])
    np.testing.assert_array_equal(element.items[:, : 4 - kept], 0)
    jax.tree.map(np.testing.assert_array_equal, element, suffix.suffix_of(sequence, 4, jnp.array(n_tokens)))


def test_padding_is_neither_kept_nor_differentiated_even_if_it_is_nan():
    sequence = jnp.array([[1.0], [jnp.nan], [jnp.nan]])

    def loss(sequence):
        element = suffix.suffix_of(sequence, 2, jnp.array(1))
        return jnp.sum(suffix.combine(suffix.identity((2, 1)), element).items)

    value, gradient = jax.value_and_grad(loss)(sequence)
    assert value == 1 and gradient[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_slots_that_are_not_real_are_ignored():
    rubbish = Suffix(jnp.full((3, 1), jnp.nan), jnp.array(0))
    one = suffix.suffix_of(jnp.ones((1, 1)), 3)
    for merged in (suffix.combine(rubbish, one), suffix.combine(one, rubbish)):
        jax.tree.map(np.testing.assert_array_equal, merged, one)


def test_everything_empty_stays_the_identity():
    empty = suffix_of(sequences, 3, jnp.zeros((PIECES, ROWS), int))
    jax.tree.map(np.testing.assert_array_equal, fold(empty), suffix.identity((ROWS, 3, D)))


def test_items_keep_their_dtype():
    element = suffix.suffix_of(sequences[0].astype(jnp.bfloat16), 2)
    assert suffix.combine(element, element).items.dtype == jnp.bfloat16


def test_errors_name_what_to_do():
    with pytest.raises(ValueError, match="suffix.suffix_of: needs width >= 1, got width=0; keep at least one item"):
        suffix.suffix_of(sequences, 0)
    with pytest.raises(
        ValueError, match=r"needs items of one shape \[..., W, D\], got a.items=\(2, 1\) and b.items=\(3, 1\)"
    ):
        suffix.combine(suffix.identity((2, 1)), suffix.identity((3, 1)))
