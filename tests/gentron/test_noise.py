"""Noise as a function of (seed, stream, frame), against Philox written out in plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gentron.errors import RequestError
from gentron.noise import INITIAL, MAX_SEED, check_seed, normal

WORD = 2**64 - 1
KEY = int.from_bytes(b"GenTron", "big")
seeds = st.one_of(st.integers(0, MAX_SEED), st.sampled_from([0, 2**63 - 1, 2**63, MAX_SEED]))


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x64-10 of one counter: Salmon et al. 2011, section 4.3."""
    (a, b, c, d), (k, j) = counter, key
    for _ in range(10):
        ac, cc = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (cc >> 64) ^ b ^ k, cc & WORD, (ac >> 64) ^ d ^ j, ac & WORD
        k, j = (k + 0x9E3779B97F4A7C15) & WORD, (j + 0xBB67AE8584CAA73B) & WORD
    return a, b, c, d


def raw_bits(seed: int, stream: int, frame: int, count: int) -> list[int]:
    """The generator steps its counter before each block of four, so the first block is 1."""
    blocks = (philox((1 + i, frame, stream, 0), (seed, KEY)) for i in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(blocks), count))


def expected_normal(seed: int, stream: int, frame: int, count: int) -> list[float]:
    """Box and Muller 1958: the first half of the bits are radii, the second half angles."""
    pairs = (count + 1) // 2
    uniform = [(bits >> 11) / 2**53 for bits in raw_bits(seed, stream, frame, 2 * pairs)]
    radius = [math.sqrt(-2 * math.log(1 - u)) for u in uniform[:pairs]]
    angle = [2 * math.pi * u for u in uniform[pairs:]]
    polar = list(zip(radius, angle, strict=True))
    return [*(r * math.cos(a) for r, a in polar), *(r * math.sin(a) for r, a in polar)][:count]


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (WORD,) * 4,
            (WORD,) * 2,
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
    ],
)
def test_philox_as_written_here_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], block: tuple[int, ...]
) -> None:
    """The known-answer vectors of Random123, the authors' own library."""
    assert philox(counter, key) == block


@pytest.mark.parametrize(("seed", "stream", "frame"), [(0, 0, 0), (5, 3, 2), (MAX_SEED, 1, 7)])
def test_numpys_raw_bits_are_philox(seed: int, stream: int, frame: int) -> None:
    key = np.array([seed, KEY], np.uint64)
    generator = np.random.Philox(key=key, counter=[0, frame, stream, 0])
    assert generator.random_raw(11).tolist() == raw_bits(seed, stream, frame, 11)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=seeds, stream=st.integers(0, 1000), frame=st.integers(0, 15), count=st.integers(1, 9))
def test_noise_is_box_muller_of_philox_for_every_seed(
    seed: int, stream: int, frame: int, count: int
) -> None:
    ours = normal(seed, stream, frame + 1, (count,))
    assert ours.dtype == np.float32
    # Rounding to float32 at |x| < 8.6, with room for the last bit of log and cos.
    expected = expected_normal(seed, stream, frame, count)
    np.testing.assert_allclose(ours[frame], expected, rtol=2e-7, atol=1e-12)


GOLDEN = [
    (0, INITIAL, 0, [-1.76997912, -0.526768148, -0.00795527268, 0.557003736, -1.10338104]),
    (0, 3, 2, [1.30323529, 0.438742161, -0.653901398, -0.468912005, 0.71818018]),
    (2**64 - 1, INITIAL, 0, [1.18817186, 0.360600621, 0.223046944, -1.02029395, -2.08861971]),
    (2**64 - 1, 3, 2, [-1.52179599, 0.151448369, 2.55417585, -0.490565985, -0.307444066]),
]


@pytest.mark.parametrize(("seed", "stream", "frame", "values"), GOLDEN)
def test_noise_is_what_it_has_always_been(
    seed: int, stream: int, frame: int, values: list[float]
) -> None:
    """Frozen: if this fails, no stored seed makes its picture again. Cut to seven values, of which
    five are written; the tolerance is two last places of float32."""
    ours = normal(seed, stream, frame + 1, (7,))[frame, :5]
    np.testing.assert_allclose(ours, values, rtol=2.4e-7)


# --- what it depends on ---


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1,), (1, 1, 1)])
def test_one_frame_is_frame_0_of_many(shape: tuple[int, ...]) -> None:
    many = normal(7, INITIAL, 5, shape)
    assert many.shape == (5, *shape)
    for frames in (1, 2, 5):
        assert (normal(7, INITIAL, frames, shape) == many[:frames]).all()


def test_noise_is_a_function_of_its_arguments() -> None:
    first = normal(11, 4, 2, (3, 5))
    normal(12, 4, 2, (3, 5))
    np.random.default_rng(0).standard_normal(9)
    assert (normal(11, 4, 2, (3, 5)) == first).all()


def test_every_seed_stream_and_frame_has_values_of_its_own() -> None:
    values = [
        normal(seed, stream, 3, (64,))[frame]
        for seed in (0, 1, 2, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)
        for stream in (0, 1, 2)
        for frame in (0, 1, 2)
    ]
    for one, other in itertools.combinations(values, 2):
        assert not np.isin(one, other).any()


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1, 1), (7, 9), (3, 3, 5)])
def test_an_odd_number_of_values_leaves_out_the_last_of_an_even_one(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    even = normal(3, 1, 2, (count + 1,))
    assert (normal(3, 1, 2, shape).reshape(2, -1) == even[:, :count]).all()


def test_the_values_are_laid_out_in_c_order_whatever_the_shape() -> None:
    flat = normal(3, 1, 1, (24,))
    assert (normal(3, 1, 1, (2, 3, 4)).ravel() == flat.ravel()).all()


# --- how it is distributed ---

COUNT = 10**6


def test_a_million_values_have_the_moments_of_a_standard_normal() -> None:
    """Bounds are five standard errors: 1/sqrt(n), sqrt(2/n), sqrt(6/n) and sqrt(24/n)."""
    x = normal(2024, INITIAL, 1, (COUNT,)).astype(np.float64).ravel()
    error = 5 / math.sqrt(COUNT)
    assert abs(x.mean()) < error
    assert abs(x.var() - 1) < error * math.sqrt(2)
    standard = (x - x.mean()) / x.std()
    assert abs((standard**3).mean()) < error * math.sqrt(6)
    assert abs((standard**4).mean() - 3) < error * math.sqrt(24)
    assert np.isfinite(x).all()
    assert np.abs(x).max() < math.sqrt(2 * 53 * math.log(2))  # the least uniform is 2^-53


def test_the_share_in_each_tail_is_that_of_a_standard_normal() -> None:
    x = normal(2025, INITIAL, 1, (COUNT,)).ravel()
    for bound in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0):
        share = 0.5 * math.erfc(-bound / math.sqrt(2))
        spread = math.sqrt(share * (1 - share) / COUNT)
        assert abs((x <= bound).mean() - share) < 5 * spread, bound


def test_seeds_streams_frames_and_halves_of_a_pair_are_uncorrelated() -> None:
    """The correlation of n independent pairs has standard deviation 1/sqrt(n)."""
    n = 100_000
    first = normal(0, 0, 1, (2 * n,)).ravel()
    others = {
        "half of a pair": (first[:n], first[n:]),
        "neighbour": (first[:-1], first[1:]),
        "seed": (first, normal(1, 0, 1, (2 * n,)).ravel()),
        "stream": (first, normal(0, 1, 1, (2 * n,)).ravel()),
        "frame": (first, normal(0, 0, 2, (2 * n,))[1]),
    }
    for name, (one, other) in others.items():
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(n), name


# --- seeds ---


@pytest.mark.parametrize(
    ("seed", "samples"), [(0, 1), (MAX_SEED, 1), (MAX_SEED - 3, 4), (np.int64(5), 2)]
)
def test_a_seed_is_accepted_where_every_sample_has_one(seed: int, samples: int) -> None:
    check_seed(seed, samples)


@pytest.mark.parametrize(
    ("seed", "samples"),
    [(-1, 1), (MAX_SEED + 1, 1), (MAX_SEED, 2), (MAX_SEED - 2, 4), (1.5, 1), (math.nan, 1)],
)
def test_a_seed_that_no_64_bits_hold_is_refused(seed: int, samples: int) -> None:
    with pytest.raises(RequestError, match=r"^seed: must be ") as caught:
        check_seed(seed, samples)
    assert caught.value.field == "seed"


def test_noise_of_a_seed_out_of_bounds_is_refused() -> None:
    with pytest.raises(RequestError, match=r"seed: must be .* 2\*\*64 - 1, got -1"):
        normal(-1, INITIAL, 1, (4,))
