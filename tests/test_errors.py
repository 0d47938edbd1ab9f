"""Errors travel between processes without the frames that raised them, so that they can be kept."""

from __future__ import annotations

import pickle

import pytest
import tblib.pickling_support

from distkv_dask.errors import DistKVError, InvalidRequestError, PlanError, portable

OURS = [InvalidRequestError("too long"), PlanError("no room", 3), DistKVError("lost")]


tblib.pickling_support.install()  # as Dask does: pickled and copied errors then keep their tracebacks


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
def test_an_error_that_travels_leaves_the_calls_behind_that_raised_it(error: DistKVError) -> None:
    def fail() -> None:
        try:
            raise KeyError("something that the message need not say")
        except KeyError as cause:
            raise error from cause

    with pytest.raises(type(error)) as raised:
        fail()
    told = portable(raised.value, "somewhere")
    assert (type(told), told.args, str(told)) == (type(error), error.args, str(error))
    assert told.__traceback__ is told.__cause__ is told.__context__ is None
    assert raised.value.__traceback__ is not None, "who raised it still finds the place"
    assert pickle.loads(pickle.dumps(told)).args == error.args


def test_errors_of_others_travel_in_words() -> None:
    told = portable(ZeroDivisionError("by zero"), "worker tcp://a:1")
    assert type(told) is DistKVError
    assert str(told) == "ZeroDivisionError on worker tcp://a:1: by zero"
