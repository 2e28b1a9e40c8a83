"""Randomness that privacy rests on: an AES-CTR stream keyed by the operating system.

Differential privacy holds against whoever cannot foretell the noise and who was sampled. A seeded
Mersenne Twister can be foretold: its seed is in a configuration, two sites that share it cancel their
noise, a checkpoint that holds its state replays it. So the stream is keyed from ``os.urandom``, cannot
be copied, pickled or saved, and takes a new key after a fork. ``insecure_seed`` gives the reproducible
variant, for tests and experiments alone: whatever is released under it has no privacy guarantee.

Gaussian noise in floating point leaks through the gaps between the values that a sampler can return
(Mironov, On significance of the least significant bits for differential privacy, CCS 2012; Jin et al.,
arXiv 2112.05307). The guard is that of Opacus' ``secure_mode``: the sum of 2 n independent draws,
divided by sqrt(2 n), n = 2 (Holohan and Braghin, Secure random sampling in differential privacy,
arXiv 2107.10138, section 5.1), here computed in float64 from uniform numbers of 53 bits each.
"""

import hashlib
import os
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

DRAWS = 4  # 2 n of the guard
BLOCK = 1 << 15  # Gaussian numbers computed at a time: their uniform numbers stay in the cache
MANTISSA = 53
STATE_AT, STATE_WORDS = 24, 624  # the words of torch's Mersenne Twister within its state, in bytes


class SecureStream:
    """Random numbers from AES-256 in counter mode.

    Args:
        insecure_seed: None keys the stream from the operating system. A number makes it reproducible,
            and worthless for privacy.
        name: what an insecure stream is for; streams of other names are independent of it.
    """

    def __init__(self, insecure_seed: int | None = None, name: str = ""):
        self.insecure = insecure_seed is not None
        self._start(hashlib.sha256(f"{insecure_seed} {name}".encode()).digest() if self.insecure else None)

    def _start(self, key: bytes | None) -> None:
        cipher = Cipher(algorithms.AES256(os.urandom(32) if key is None else key), modes.CTR(bytes(16)))
        self._cipher, self._process = cipher.encryptor(), os.getpid()

    def integers(self, count: int) -> np.ndarray:
        """Draw uniform integers, uint64 [count] in 0..2^53 - 1: a double holds each exactly."""
        if self._process != os.getpid() and not self.insecure:
            self._start(None)  # a child of a fork would repeat its parent's noise
        encrypted = self._cipher.update(bytes(8 * count))
        return np.frombuffer(encrypted, np.uint64) >> np.uint64(64 - MANTISSA)

    def chances(self, count: int, probability: float) -> np.ndarray:
        """Toss coins, boolean [count]; ``probability`` in [0, 1] is rounded down to 53 bits, never up."""
        return self.integers(count) < np.uint64(int(probability * 2**MANTISSA))

    def gaussian(self, like: Tensor, std: float) -> Tensor:
        """Draw Gaussian noise of mean 0 in the shape, type and device of ``like``."""
        found = torch.empty(like.numel(), dtype=like.dtype)
        for start in range(0, len(found), BLOCK):
            part = found[start : start + BLOCK]
            part.copy_(self._normal(len(part)).mul_(std))
        return found.view(like.shape).to(like.device)

    def generator(self) -> torch.Generator:
        """Make a generator whose draws nobody foretells: for views and explored cells of a private step.

        Were they public, it would be known which draw each position of a batch gets. A patient less moves
        all others to other draws, and the sum changes by far more than one clipped gradient. Torch's
        Mersenne Twister takes 32 bits of a seed, which can be tried out; here its whole state is drawn.
        """
        generator = torch.Generator()
        state = generator.get_state()
        words = state.numpy()[STATE_AT : STATE_AT + 8 * STATE_WORDS].view(np.uint64)
        words[:] = self.integers(STATE_WORDS) & np.uint64(0xFFFFFFFF)
        return generator.set_state(state)

    def _normal(self, count: int) -> Tensor:
        """Standard normal numbers, float64 [count], each the guarded sum of ``DRAWS`` by Box and Muller.

        A radius and an angle give two numbers, which go to two different sums.
        """
        half = (count + 1) // 2
        uniform = torch.from_numpy(self.integers(2 * DRAWS * half).astype(np.float64))
        uniform = uniform.view(2, DRAWS, half)
        radius = uniform[0].add_(1.0).mul_(2.0**-MANTISSA).log_().mul_(-2 / DRAWS).sqrt_()
        angle = uniform[1].mul_(2 * np.pi * 2.0**-MANTISSA)
        pairs = torch.stack([(radius * angle.cos()).sum(0), (radius * angle.sin()).sum(0)])
        return pairs.view(-1)[:count]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a noise stream can be neither pickled nor copied: replayed noise hides nothing")
