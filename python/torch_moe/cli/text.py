"""Real input for the benchmark: text that every Python carries, embedded so that routing is skewed as in a model.

A token is a byte. Its vector comes from a seeded table [256, H]; a seeded causal depthwise convolution then mixes in
the bytes before it, so that the same byte in another context is another vector, yet near its siblings. Frequent bytes
therefore crowd on a few experts, as frequent tokens do in a trained model.
"""

from __future__ import annotations

import importlib
import random
import sysconfig
from pathlib import Path

import torch

CORPUS_BYTES = 1 << 21
SEQUENCE_LENGTH = 128
KERNEL_SIZE = 4
# Weight of the byte j places back, relative to the byte itself.
DECAY = 0.5


def read_corpus(num_bytes: int = CORPUS_BYTES) -> bytes:
    """Read prose and source code from the running Python, half and half where both are there.

    Parameters
    ----------
    num_bytes : int, default=2097152
        Length asked for; less comes back when there is less text.

    Returns
    -------
    bytes
        Help texts of `pydoc_data.topics`, then sources of the standard library in order of name.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    prose = "\n".join(topics[name] for name in sorted(topics)).encode()[: num_bytes // 2]
    code = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(code) >= num_bytes - len(prose):
            break
        code += path.read_bytes()
    return prose + bytes(code[: num_bytes - len(prose)])


def sample_tokens(corpus: bytes, num_tokens: int, seed: int) -> torch.Tensor:
    """Cut seeded stretches of up to 128 consecutive bytes out of a corpus.

    Parameters
    ----------
    corpus : bytes
        Text, longer than one stretch.
    num_tokens : int
        Number of bytes in all.
    seed : int
        Chooses the places.

    Returns
    -------
    Tensor of shape (ceil(num_tokens / 128), 128), dtype=int64
        Byte values; the caller drops what exceeds `num_tokens`.
    """
    chooser = random.Random(seed)
    starts = [chooser.randrange(len(corpus) - SEQUENCE_LENGTH) for _ in range(-(-num_tokens // SEQUENCE_LENGTH))]
    rows = [list(corpus[start : start + SEQUENCE_LENGTH]) for start in starts]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), SEQUENCE_LENGTH)


def embed(tokens: torch.Tensor, hidden_size: int, seed: int) -> torch.Tensor:
    """Embed bytes and mix each with the ones before it in its stretch.

    Parameters
    ----------
    tokens : Tensor of shape (num_sequences, length), dtype=int64
        Byte values.
    hidden_size : int
        Width H.
    seed : int
        Of the table and the convolution.

    Returns
    -------
    Tensor of shape (num_sequences * length, hidden_size), dtype=float32
        Each row has a root mean square of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(256, hidden_size, generator=generator)
    kernel = 1.0 + 0.5 * torch.randn(KERNEL_SIZE, hidden_size, generator=generator)
    mixed = torch.zeros(*tokens.shape, hidden_size)
    embedded = table[tokens]
    for back in range(min(KERNEL_SIZE, tokens.shape[1])):
        length = tokens.shape[1] - back
        mixed[:, back:] += DECAY**back * kernel[back] * embedded[:, :length]
    rows = mixed.reshape(-1, hidden_size)
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt()


def hidden_states(num_tokens: int, hidden_size: int, seed: int) -> torch.Tensor:
    """Return real text as layer input.

    Parameters
    ----------
    num_tokens, hidden_size : int
        T and H.
    seed : int
        Of places, table and convolution.

    Returns
    -------
    Tensor of shape (num_tokens, hidden_size), dtype=float32
        One row per byte.
    """
    return embed(sample_tokens(read_corpus(), num_tokens, seed), hidden_size, seed)[:num_tokens]
