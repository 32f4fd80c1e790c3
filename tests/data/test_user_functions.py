"""Functions that a user gave: the keywords they take, values of their own, one loop for what is async."""

import asyncio
import threading
from functools import partial

import numpy as np
import pytest
import torch

from trl.data.user_functions import Awaited, accepted, in_order, is_async, own


def test_a_function_gets_what_it_has_parameters_for():
    columns = {"a": 1, "b": 2}
    assert accepted(lambda a: 0, columns) == {"a": 1}
    assert accepted(lambda a, **further: 0, columns) == columns
    assert accepted(partial(lambda a, b: 0, b=3), columns) == columns


def test_copies_are_apart_at_every_depth():
    """R2"""
    message, array, tensor = {"role": "user", "content": "a"}, np.zeros(2), torch.zeros(2)
    lock = threading.Lock()
    given = {"prompts": [[message], [message]], "arrays": (array, tensor, {1}), "lock": lock}
    mine = own(given)
    mine["prompts"][0][0]["content"] = "b"
    mine["arrays"][0][0], mine["arrays"][1][0] = 1, 1
    mine["arrays"][2].add(2)
    assert message["content"] == mine["prompts"][1][0]["content"] == "a"
    assert (array[0], tensor[0].item(), given["arrays"][2]) == (0, 0, {1})
    assert mine["lock"] is lock


@pytest.mark.parametrize("value", [{0: 1.0}, {1.0}, frozenset({1.0}), {0: 1.0}.keys(), "10", b"10"])
def test_what_has_no_order_is_refused_by_its_type(value):
    """R6"""
    with pytest.raises(TypeError, match=f"a {type(value).__name__}; give a list"):
        in_order(value)


def test_what_has_an_order_is_read():
    for values in ({"x": 1.0, "y": 2.0}.values(), iter([1.0, 2.0]), torch.tensor([1, 2])):
        assert in_order(values) == [1, 2]


class Judge:
    async def __call__(self):
        return 1


async def coroutine():
    return 1


def test_async_functions_are_known_in_all_forms():
    assert all(map(is_async, (coroutine, Judge(), partial(coroutine), partial(Judge()))))
    assert not any(map(is_async, (len, lambda: coroutine(), Judge)))


def test_all_run_on_one_loop_also_beside_a_running_one():
    """R1"""
    gate = asyncio.Semaphore(1)

    async def ask():
        async with gate:
            await asyncio.sleep(0)
        return asyncio.get_running_loop()

    async def notebook():
        return [Awaited(ask).result(), Awaited.of(ask()).result()]

    loops = [Awaited(ask).result(), *asyncio.run(notebook()), Awaited(ask).result()]
    assert len(set(map(id, loops))) == 1


def test_a_future_of_a_loop_that_stands_still_is_refused():
    async def notebook():
        return Awaited.of(asyncio.ensure_future(coroutine()))

    with pytest.raises(ValueError, match="a future of another event loop"):
        asyncio.run(notebook())


def test_a_task_that_leaves_takes_no_loop_with_it():
    async def leaves():
        raise SystemExit(3)

    async def asks():
        await asyncio.gather(leaves())

    with pytest.raises(RuntimeError, match=r"SystemExit\(3\)"):
        Awaited(asks).result()
    assert Awaited(coroutine).result() == 1
