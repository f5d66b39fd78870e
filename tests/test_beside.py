"""Work beside this process: the same results and errors with a second process and without."""

import os

import pytest

from orpo.curation.beside import second_process


@pytest.fixture(params=[1, 2])
def cores(request, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(request.param)), raising=False)
    return request.param


def test_results_come_back_in_any_order(cores):
    with second_process() as start:
        first, second = start(pow, 2, 10), start(sorted, [3, 1, 2])
        assert second() == [1, 2, 3]
        assert first() == 1024


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_it_is_another_process_where_there_is_a_core_for_it(cores):
    with second_process() as start:
        assert (start(os.getpid)() == os.getpid()) == (cores == 1)


def test_what_the_work_raises_is_raised_where_its_result_is_asked_for(cores):
    with second_process() as start:
        wait = start(int, "three")
        with pytest.raises(ValueError, match="three"):
            wait()
