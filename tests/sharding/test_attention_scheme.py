"""Which scheme is chosen: what the estimate knows, what fits, what heads and masks allow, and how it says so."""

import pytest

from jaxmem.pallas_kernels.masks import Mask
from jaxmem.sharding.attention import Scheme
from jaxmem.sharding.attention_scheme import CHIPS, Shape, all_choices, choose_scheme

LONG = Shape(batch=1, n_tokens=2**20, n_heads=32, n_kv_heads=8, key_dim=128, value_dim=128)
ZIGZAG = ("zigzag",)


def schemes(*arguments, **options) -> set[Scheme]:
    return {choice.scheme for choice in all_choices(*arguments, **options)}


def test_a_long_causal_sequence_goes_round_in_a_ring_and_balanced():
    choice = choose_scheme(LONG, 64, layouts=("contiguous", "zigzag"))
    assert choice.scheme.keys == "ring" and choice.layout == "zigzag"
    contiguous = choose_scheme(LONG, 64)
    assert contiguous.seconds > 1.8 * choice.seconds, "the last device of a contiguous ring sees everything"


def test_a_short_one_is_not_worth_a_ring():
    """Exchanges that no arithmetic hides: all links at once, or heads for tokens."""
    short = Shape(batch=1, n_tokens=4096, n_heads=32, n_kv_heads=8, key_dim=128, value_dim=128)
    assert choose_scheme(short, 8).scheme != Scheme("ring")


def test_a_window_needs_no_more_than_its_halo():
    assert choose_scheme(LONG, 64, Mask(window=4096)).scheme == Scheme("halo")
    assert Scheme("halo") not in schemes(LONG, 64)
    assert Scheme("halo") not in schemes(LONG, 64, Mask(causal=False, window=4096))
    assert Scheme("halo") not in schemes(LONG, 64, Mask(window=4096), layouts=ZIGZAG)


def test_heads_are_shared_out_only_as_far_as_they_go():
    assert {scheme.ulysses for scheme in schemes(LONG, 64)} == {1, 2, 4, 8, 16, 32}
    three = Shape(batch=1, n_tokens=2**20, n_heads=3, n_kv_heads=1, key_dim=128, value_dim=128)
    assert {scheme.ulysses for scheme in schemes(three, 8)} == {1}


def test_what_does_not_fit_is_not_chosen():
    wide = Shape(batch=1, n_tokens=2**21, n_heads=32, n_kv_heads=32, key_dim=128, value_dim=128)
    gathered = next(c for c in all_choices(wide, 64, chip="v5e") if c.scheme == Scheme("all_gather"))
    chosen = choose_scheme(wide, 64, chip="v5e")
    assert gathered.memory_bytes > CHIPS["v5e"].memory_bytes / 4 >= chosen.memory_bytes


@pytest.mark.parametrize("chip", CHIPS)
def test_every_choice_says_why(chip):
    for choice in all_choices(LONG, 64, chip=chip):
        assert choice.seconds > 0
        assert f"{choice.scheme.keys} over {64 // choice.scheme.ulysses} x Ulysses over " in choice.reason
        assert "ms of arithmetic" in choice.reason and "MiB" in choice.reason


def test_errors():
    with pytest.raises(ValueError, match="needs chip to be one of v4, v5e, .*, got chip='v9'; change it"):
        choose_scheme(LONG, 64, chip="v9")
    odd = Shape(batch=1, n_tokens=1000, n_heads=4, n_kv_heads=4, key_dim=64, value_dim=64)
    with pytest.raises(
        ValueError, match=r"tokens that 16 divides, for zigzag over 8 devices, got 1000; pad with 8 tokens"
    ):
        choose_scheme(odd, 8, layouts=ZIGZAG)
