"""Patches of one store through a frozen encoder, in batches; decoding runs ahead in threads.

Legend: S patches, H and W pixels, F features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from hibio.backbones.frozen import FrozenBackbone
from hibio.config import ConfigError

#: Spot numbers (n,) -> uint8 patches (n, H, W, 3).
Reader = Callable[[np.ndarray], np.ndarray]
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def encode_patches(
    read: Reader,
    spots: int,
    network: FrozenBackbone,
    *,
    batch: int = 64,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Encode all patches of a store.

    Args:
        read: gives the patches of some spots; called from threads when ``workers`` > 0.
        spots: S.
        network: the encoder, on its device.
        batch: patches of one forward pass.
        workers: threads that read ahead, two batches each; 0 reads between the passes.
        progress: told the number of patches after every pass.

    Returns:
        (S, F) float16, or float32 from the first batch on that exceeds its range.

    Raises:
        ConfigError: a batch does not fit into the memory of the device.
    """
    device = network.mean_C11.device
    result: np.ndarray | None = None
    for index, patches_SHWC in _batches(read, spots, batch, workers):
        features = _forward(network, patches_SHWC, device)
        if result is None:
            result = np.empty((spots, features.shape[1]), dtype=np.float16)
        if result.dtype == np.float16 and np.abs(features).max() > _FLOAT16_MAX:
            result = result.astype(np.float32)
        result[index] = features
        if progress is not None:
            progress(len(index))
    if result is None:
        raise ConfigError(f"{spots} patches to encode; expected at least 1")
    return result


def _forward(network: FrozenBackbone, patches_SHWC: np.ndarray, device: torch.device) -> np.ndarray:
    try:
        return (
            network(torch.from_numpy(np.ascontiguousarray(patches_SHWC)).to(device)).cpu().numpy()
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{len(patches_SHWC)} patches at once do not fit into the memory of {device}; give a "
            f"smaller --batch (half: {max(1, len(patches_SHWC) // 2)})"
        ) from error


def _batches(
    read: Reader, spots: int, batch: int, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Spot numbers and patches in the order of the store, read ahead by ``workers`` threads."""
    indices = [np.arange(i, min(i + batch, spots)) for i in range(0, spots, batch)]
    if workers == 0:
        yield from ((index, read(index)) for index in indices)
        return
    waiting: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for index in indices:
                waiting.append((index, pool.submit(read, index)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
