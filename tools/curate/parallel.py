"""Run a function on many things in processes of their own, so that one that crashes or hangs harms only itself."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from itertools import chain, islice
from typing import Any

from pebble import ProcessExpired, ProcessPool

AHEAD = 3  # things a process has waiting


class Failed(str):
    """Why a thing could not be done by its process."""


def parallel(function: Callable[[Any], Any], things: Iterable, workers: int, timeout_s: float) -> Iterator[tuple]:
    """Yield (thing, result) as they are done, in any order; the result is a `Failed` where a process crashed or hung.

    Args:
        function: of a module, as are its arguments and result picklable.
        things: taken one after the other, never many more than are at work.
        workers: processes.
        timeout_s: for one thing.

    Raises:
        whatever the function raises.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    things = iter(things)
    first = next(things, None)
    if first is None:
        return
    things = chain((first,), things)
    with ProcessPool(workers, context=context) as pool:
        waiting: dict = {}
        try:
            while True:
                for thing in islice(things, workers * AHEAD - len(waiting)):
                    waiting[pool.schedule(function, args=(thing,), timeout=timeout_s)] = thing
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    thing = waiting.pop(future)
                    try:
                        result = future.result()
                    except TimeoutError:
                        result = Failed(f"reading it took longer than {timeout_s:g} s")
                    except ProcessExpired:
                        result = Failed("reading it crashed, or took all memory")
                    yield thing, result
        except BaseException:
            pool.stop()
            raise
