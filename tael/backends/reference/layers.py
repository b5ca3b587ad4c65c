"""What each layer computes. All arrays are float32; T tokens, H heads, D channels a head."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tael.models.spec import Rope

Float32 = NDArray[np.float32]


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """Normalise the last axis to a root mean square of 1, then scale each channel."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    normalised: Float32 = x / np.sqrt(mean_square + np.float32(eps))
    return normalised * weight


def linear(x: Float32, weight: Float32, bias: Float32 | None = None) -> Float32:
    """[T, columns] by [rows, columns] gives [T, rows]."""
    y: Float32 = x @ weight.T
    return y if bias is None else y + bias


def rotary(x: Float32, positions: NDArray[np.int32], rope: Rope) -> Float32:
    """Turn pair (i, i + n) of each head of ``x`` [T, H, D] by position * inv_freq[i], where n
    is the number of frequencies; channels from 2 n on stay as they are."""
    inv_freq = np.array(rope.inv_freq, np.float32)
    angles = positions.astype(np.float32)[:, None, None] * inv_freq
    cos = np.cos(angles) * np.float32(rope.attention_factor)
    sin = np.sin(angles) * np.float32(rope.attention_factor)
    n = len(inv_freq)
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return np.concatenate(turned, axis=-1)


def attention(
    q: Float32,
    k: Float32,
    v: Float32,
    query_positions: NDArray[np.int32],
    key_positions: NDArray[np.int32],
    scale: float,
    window: int | None,
) -> Float32:
    """Queries [T, H, D] over keys and values [S, num_kv_heads, D]; returns [T, H * D].

    H / num_kv_heads consecutive query heads share a key head. A query sees the keys at its own
    position and before it, within the window.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    distance = query_positions[:, None] - key_positions
    visible = distance >= 0
    if window is not None:
        visible &= distance < window

    # [num_kv_heads, queries that share a head, T, D] against [num_kv_heads, 1, S, D]
    grouped = q.reshape(num_tokens, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    keys, values = k.transpose(1, 0, 2)[:, None], v.transpose(1, 0, 2)[:, None]
    scores = np.float32(scale) * (grouped @ keys.swapaxes(-1, -2))
    scores = np.where(visible, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Float32 = weights @ values
    return mixed.transpose(2, 0, 1, 3).reshape(num_tokens, num_heads * head_dim)


def silu(x: Float32) -> Float32:
    with np.errstate(over="ignore"):  # below -88 it divides by infinity, which gives the limit
        y: Float32 = x / (1 + np.exp(-x))
    return y


def gelu_tanh(x: Float32) -> Float32:
    """The tanh approximation of GELU (arXiv:1606.08415)."""
    y: Float32 = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return y


ACTIVATIONS: dict[str, Callable[[Float32], Float32]] = {"silu": silu, "gelu_tanh": gelu_tanh}
"""By ``Dense.activation``."""
