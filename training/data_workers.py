"""Worker processes that prepare training data: some streams each, so that their number changes nothing.

They are those of torch's DataLoader, and end with the training process, whatever ends it.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from multiprocessing.context import BaseContext
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from stream import MixedStream, Stream, StreamState
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

T = TypeVar("T")

Round = dict[int, tuple[Any, StreamState]]
"""What some streams have next: by stream int64 ``[each, sequence_length]`` and the state after it."""

_AHEAD = 2  # rounds, of each worker


def rounds(streams: Mapping[int, Stream | MixedStream], each: int) -> Iterator[Round]:
    """Endless: ``each`` sequences of every stream, again and again; errors are those of the streams."""
    while True:
        yield {
            v: (np.array(list(islice(stream, each)), dtype=np.int64), copy.deepcopy(stream.state))
            for v, stream in streams.items()
        }


def from_workers(
    streams: Mapping[int, Callable[[], Stream | MixedStream]], each: int, workers: int
) -> Generator[Round, None, None]:
    """As :func:`rounds`, of streams that are built in ``workers`` processes; close it to end them.

    Raises:
        Exception: that of a stream, as it was raised there.
        ChildProcessError: a worker died.

    """
    loader: DataLoader[Any] = DataLoader(
        _Share(dict(streams), each),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        worker_init_fn=_begin,
        multiprocessing_context=_context(),
        # Else it takes a number from the random state that dropout depends on.
        generator=torch.Generator(),
    )
    parts = iter(loader)
    try:
        while True:
            whole: Round = {}
            for _ in range(workers):
                part = next(parts)  # of one worker after another
                if isinstance(part, Exception):
                    raise part
                whole |= part
            yield whole
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"{str(error).splitlines()[0]}. If memory was short, lower data_workers={workers}, and --resume."
        ) from error
    finally:
        del parts  # ends the workers


def _context() -> BaseContext:
    """How they start: as forks of a server that has imported everything once, and that they end with.

    Forks of the training process would have locks of threads that they do not have: the tokenizer's, CUDA's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "data"])
    return context


class _Share(IterableDataset[Any]):
    """In a worker, the rounds of its streams; an error comes as the last item."""

    def __init__(self, streams: dict[int, Callable[[], Stream | MixedStream]], each: int) -> None:
        self._streams, self._each = streams, each

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        own = islice(self._streams.items(), info.id, None, info.num_workers)
        try:
            yield from rounds({v: build() for v, build in own}, self._each)
        except Exception as error:
            yield _sendable(error)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in a data worker: {error}")
    return error


def _as_it_is(item: T) -> T:
    return item


def _begin(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many threads as workers, and no more
    # The training process decides when to end, and may save a checkpoint first. Its last means is a second
    # SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once_ignored)
    Thread(target=_end_with_training, daemon=True).start()


def _end_with_training() -> None:
    # The DataLoader looks at the parent's id, and the parent is the server, which lives as long as its forks.
    training = multiprocessing.parent_process()
    assert training is not None
    training.join()
    os._exit(1)


def _once_ignored(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
