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
import math
import os
from collections.abc import Sequence
from functools import reduce
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

DRAWS = 4  # 2 n of the guard
BLOCK = 1 << 13  # Gaussian numbers computed at a time: what they are made of stays in the cache
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
        return self._fill(_Words(count)).copy()

    def chances(self, count: int, probability: float) -> np.ndarray:
        """Toss coins, boolean [count]; ``probability`` in [0, 1] is rounded down to 53 bits, never up."""
        return self.integers(count) < np.uint64(int(probability * 2**MANTISSA))

    def gaussian(self, like: Tensor, std: float) -> Tensor:
        """Draw Gaussian noise of mean 0 in the shape, type and device of ``like``."""
        found = torch.empty(like.numel(), dtype=like.dtype)
        if len(found):
            blocks = math.ceil(len(found) / BLOCK)
            room = _Room(math.ceil(len(found) / (2 * blocks)))  # blocks of one size: nothing is drawn in vain
            for part in found.split(room.sums.numel()):
                self._normal(room)
                part.copy_(room.sums.view(-1)[: len(part)].mul_(std))
        return found.view(like.shape).to(like.device)

    def gaussians(self, like: Sequence[Tensor], std: float) -> list[Tensor]:
        """Draw the noise of many tensors at once, as ``gaussian`` does of one; they share their memory."""
        if not like:
            return []
        sizes, widest = [p.numel() for p in like], reduce(torch.promote_types, {p.dtype for p in like})
        drawn = self.gaussian(like[0].new_empty(sum(sizes), dtype=widest), std)
        return [part.view(p.shape).to(p.dtype) for part, p in zip(drawn.split(sizes), like, strict=True)]

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

    def _fill(self, words: "_Words") -> np.ndarray:
        """Draw anew all integers of a buffer."""
        if self._process != os.getpid() and not self.insecure:
            self._start(None)  # a child of a fork would repeat its parent's noise
        self._cipher.update_into(words.zeros, words.bytes)
        return np.right_shift(words.found, np.uint64(64 - MANTISSA), out=words.found)

    def _normal(self, room: "_Room") -> None:
        """Fill ``room.sums`` with standard normal numbers.

        Each is the guarded sum of ``DRAWS`` by Box and Muller; a radius and an angle give two numbers, which
        go to two different sums.
        """
        np.copyto(room.doubles, self._fill(room.words))
        room.radius.add_(1.0).mul_(2.0**-MANTISSA).log_().mul_(-2 / DRAWS).sqrt_()
        torch.cos(room.angle.mul_(2 * np.pi * 2.0**-MANTISSA), out=room.cosine)
        room.angle.sin_()
        for total, ((radius, part), *others) in room.draws:
            torch.mul(radius, part, out=total)
            for radius, part in others:
                total.addcmul_(radius, part)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a noise stream can be neither pickled nor copied: replayed noise hides nothing")


class _Words:
    """A buffer of ``count`` integers, which the cipher writes."""

    def __init__(self, count: int):
        self.zeros = bytes(8 * count)
        self.bytes = bytearray(8 * count + 15)  # OpenSSL asks for room beyond what it writes
        self.found = np.frombuffer(self.bytes, np.uint64, count)


class _Room:
    """What a block of 2 ``half`` Gaussian numbers is computed in, used for one block after the other."""

    def __init__(self, half: int):
        self.words = _Words(2 * DRAWS * half)
        self.doubles = np.empty(2 * DRAWS * half)
        self.radius, self.angle = torch.from_numpy(self.doubles).view(2, DRAWS, half)
        self.cosine = torch.empty_like(self.angle)
        self.sums = torch.empty(2, half, dtype=torch.float64)
        parts = (self.cosine, self.angle)  # by then its sine
        self.draws = [
            (total, list(zip(self.radius, part, strict=True)))
            for total, part in zip(self.sums, parts, strict=True)
        ]
