"""Noise as a pure function of (seed, step, frame): the same on every backend and in any batch.

Raw bits come from Philox-4x64 (Salmon et al. 2011), a counter-based generator whose output numpy
promises not to change; the normals are our own Box-Muller, because numpy's may change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gentron.errors import RequestError

INITIAL = 0  # the stream of the starting noise; step k of a stochastic solver draws stream k + 1
_KEY = 0x47656E54726F6E  # "GenTron": keeps our streams apart from other users of the same seeds
MAX_SEED = 2**64 - 1


def check_seed(seed: int, samples: int = 1) -> None:
    if not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED - (samples - 1):
        raise RequestError("seed", f"must be an integer from 0 to 2**64 - {samples}, got {seed}")


def normal(
    seed: int, stream: int, frames: int, frame_shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Standard normal noise, float32 [frames, *frame_shape].

    Frame f is counted apart from the others, so one frame is frame 0 of many.
    """
    check_seed(seed)
    count = int(np.prod(frame_shape))
    out = np.empty((frames, count), np.float32)
    for frame in range(frames):
        key = np.array([seed, _KEY], np.uint64)  # a plain list would pass through float64
        bits = np.random.Philox(key=key, counter=[0, frame, stream, 0])
        raw = np.asarray(bits.random_raw(2 * ((count + 1) // 2)), np.uint64).reshape(2, -1)
        uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
        radius = np.sqrt(-2 * np.log1p(-uniform[0]))  # log of (0, 1]
        angle = 2 * np.pi * uniform[1]
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        out[frame] = pairs[:count]
    return out.reshape(frames, *frame_shape)
