"""Which way should keys come? An estimate of the time of each, and the fastest with its reason.

Time of a forward and a backward pass on one device, in the seconds that arithmetic at the chip's peak and exchanges at its
links' speed would take:

    arithmetic   a = 3 . 2 (K + V) H B T^2 / n . (share of pairs that the mask leaves)      of the slowest device
    ring         max(a, e) + e / (n - 1)     e: n - 1 exchanges of keys and values, and as many of them with their gradients
    all-gather   a + e, but e over all links at once
    halo         a + what a window reaches back
    Ulysses      a + four exchanges of q, k, v, o and of their gradients

A causal ring of a contiguous layout takes twice the arithmetic of a balanced one: the last device sees everything. The
estimate compares; it predicts no step time.
"""

import dataclasses
import math

from jaxmem.pallas_kernels.masks import Mask
from jaxmem.sharding.attention import Scheme, reach_tokens
from jaxmem.sharding.layouts import check_layout
from jaxmem.sharding.rules import Layout


@dataclasses.dataclass(frozen=True)
class Chip:
    """What an estimate has to know of a device."""

    flops_per_s: float
    """Peak of bf16 products."""
    link_bytes_per_s: float
    """To one neighbour, one way."""
    links: int
    """That a collective over one mesh axis can use at once."""
    memory_bytes: float


CHIPS = {
    "v4": Chip(275e12, 45e9, 2, 32e9),
    "v5e": Chip(197e12, 45e9, 2, 16e9),
    "v5p": Chip(459e12, 90e9, 2, 96e9),
    "v6e": Chip(918e12, 90e9, 2, 32e9),
    "tpu7x": Chip(1153e12, 180e9, 2, 96e9),
    "h100": Chip(989e12, 450e9, 1, 80e9),
    "h200": Chip(989e12, 450e9, 1, 141e9),
}
"""Published peaks of one JAX device (tpu7x: half a chip): cloud.google.com/tpu/docs and NVIDIA's data sheets; links of TPUs
as in Austin et al. 2025, "How to Scale Your Model", part 2."""


KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}
"""What JAX calls a device begins with the first that fits."""


def chip_of(kind: str) -> str:
    """The name in `CHIPS` of a device kind; "v5p" for one that is not there.

    >>> chip_of("TPU v5 lite"), chip_of("NVIDIA H200 NVL"), chip_of("cpu")
    ('v5e', 'h200', 'v5p')
    """
    return next((chip for start, chip in KINDS.items() if kind.startswith(start)), "v5p")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An attention layer over a whole sequence."""

    batch: int
    """Rows on one device."""
    n_tokens: int
    n_heads: int
    """On one device."""
    n_kv_heads: int
    key_dim: int
    value_dim: int
    bytes_per_number: int = 2


@dataclasses.dataclass(frozen=True)
class Choice:
    """A scheme and its estimate."""

    scheme: Scheme
    layout: Layout
    seconds: float
    memory_bytes: float
    """Of keys and values from other devices, and q, k, v, o here."""
    reason: str


def choose_scheme(
    shape: Shape,
    n_devices: int,
    mask: Mask = Mask(),
    *,
    layouts: tuple[Layout, ...] = ("contiguous",),
    chip: str = "v5p",
) -> Choice:
    """The fastest scheme by the estimate above that fits into a quarter of the memory, and why.

    Args:
      layouts: those that the model allows; recurrences need "contiguous" among them and will get it.
      chip: a name of `CHIPS`.

    Raises: ValueError for an unknown chip, or tokens that do not divide.

    >>> shape = Shape(batch=1, n_tokens=2**20, n_heads=8, n_kv_heads=8, key_dim=128, value_dim=128)
    >>> choose_scheme(shape, 64, layouts=("zigzag",)).scheme
    Scheme(keys='ring', ulysses=1)
    >>> choose_scheme(shape, 64, Mask(window=4096)).scheme
    Scheme(keys='halo', ulysses=1)
    """
    choices = all_choices(shape, n_devices, mask, layouts=layouts, chip=chip)
    fits = [choice for choice in choices if choice.memory_bytes <= CHIPS[chip].memory_bytes / 4]
    return min(fits or choices, key=lambda choice: choice.seconds if fits else choice.memory_bytes)


def all_choices(
    shape: Shape,
    n_devices: int,
    mask: Mask = Mask(),
    *,
    layouts: tuple[Layout, ...] = ("contiguous",),
    chip: str = "v5p",
) -> list[Choice]:
    """Every scheme that these heads and tokens allow, with its estimate; arguments as of `choose_scheme`."""
    if chip not in CHIPS:
        raise ValueError(f"attention scheme: needs chip to be one of {', '.join(CHIPS)}, got chip={chip!r}; change it")
    for layout in layouts:
        check_layout(layout, shape.n_tokens, n_devices)
    degrees = [u for u in range(1, n_devices + 1) if n_devices % u == 0 and shape.n_heads % u == 0]
    choices = []
    for layout in layouts:
        for u in degrees:
            keys = ["ring", "all_gather"] if u < n_devices else ["ring"]
            if u < n_devices and layout == "contiguous" and reach_tokens(mask) is not None:
                keys.append("halo")
            choices += [_estimate(Scheme(way, u), layout, shape, n_devices, mask, CHIPS[chip]) for way in keys]
    return choices


def _estimate(scheme: Scheme, layout: Layout, shape: Shape, n_devices: int, mask: Mask, chip: Chip) -> Choice:
    here = shape.n_tokens // n_devices  # tokens per device
    groups = n_devices // scheme.ulysses
    kv_heads = math.lcm(shape.n_kv_heads, scheme.ulysses)  # repeated, if there are too few
    widths = shape.key_dim + shape.value_dim
    key_bytes = shape.batch * kv_heads * widths * shape.bytes_per_number  # of keys and values of one token
    query_bytes = shape.batch * shape.n_heads * widths * shape.bytes_per_number  # of q and o
    with_gradients = (
        2 * shape.bytes_per_number + 4
    ) / shape.bytes_per_number  # forward, backward, and dk and dv in fp32

    balanced = layout != "contiguous" or groups == 1
    seen = _seen_tokens(mask, shape.n_tokens, of_last=not balanced)
    arithmetic = 3 * 2 * widths * shape.n_heads * shape.batch * here * seen / chip.flops_per_s
    swap = 0.0 if scheme.ulysses == 1 else (1 - 1 / scheme.ulysses) * 2 * here * (key_bytes + query_bytes)
    swap_s = swap / (chip.links * chip.link_bytes_per_s)

    held = here * (key_bytes + query_bytes)
    fetched = (groups - 1) * here * key_bytes
    if scheme.keys == "halo":
        fetched = min(reach_tokens(mask), (groups - 1) * here * scheme.ulysses) * key_bytes / scheme.ulysses
    exchange_s = with_gradients * fetched / chip.link_bytes_per_s
    if scheme.keys == "ring":
        last_hop = exchange_s / max(groups - 1, 1)
        seconds, extra = max(arithmetic, exchange_s - last_hop) + last_hop, 2 * here * key_bytes
    else:
        seconds, extra = arithmetic + exchange_s / chip.links, fetched
    bound = "arithmetic" if arithmetic >= seconds / 2 else "exchanges"
    ms = [f"{1e3 * part:.3g}" for part in (seconds + swap_s, arithmetic, exchange_s, swap_s)]
    reason = (
        f"{scheme.keys} over {groups} x Ulysses over {scheme.ulysses}, {layout}: {ms[0]} ms, mostly {bound} ({ms[1]} ms of "
        f"arithmetic, {ms[2]} ms of keys, {ms[3]} ms of heads), {(held + extra) / 2**20:.3g} MiB"
    )
    return Choice(scheme, layout, seconds + swap_s, float(held + extra), reason)


def _seen_tokens(mask: Mask, n_tokens: int, *, of_last: bool) -> float:
    """Keys that a query sees, on average, or at the end of the sequence."""
    limits = [limit for limit in (mask.window, mask.chunk) if limit is not None]
    everything = float(min([n_tokens, *limits]))
    return everything if of_last or not mask.causal or mask.window else everything / 2
