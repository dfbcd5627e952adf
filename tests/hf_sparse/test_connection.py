"""What is tried again when a connection is lost, and what is not."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from hf_sparse.connection import Attempts, retried


def failing(*errors: Exception):
    """Raises one error after the other, and then gives 7."""
    left = list(errors)

    def call() -> int:
        if left:
            raise left.pop(0)
        return 7

    return call


def test_lost_connections_are_tried_again_with_a_warning_each() -> None:
    with pytest.warns(RuntimeWarning) as caught:
        assert retried(failing(ConnectionResetError("gone"), TimeoutError("slow")), "text", (0, 0)) == 7
    assert [str(one.message) for one in caught] == [
        "lost the connection to text (ConnectionResetError: gone); attempt 1 of 2 to get it back, in 0 s.",
        "lost the connection to text (TimeoutError: slow); attempt 2 of 2 to get it back, in 0 s.",
    ]


def test_the_last_failure_says_how_often_and_how_long() -> None:
    errors = [ConnectionError(f"gone {n}") for n in range(3)]
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(
            ConnectionError, match=r"the text cannot be read: .* 3 times .* of 0 s in all .*gone 2"
        ),
    ):
        retried(failing(*errors), "the text", (0, 0))


@pytest.mark.parametrize("error", [FileNotFoundError("no"), ValueError("bad"), OfflineModeIsEnabled("off")])
def test_other_errors_are_themselves_at_once(error) -> None:
    with pytest.raises(type(error), match=str(error)):
        retried(failing(error), "the text", (0, 0))


@pytest.mark.filterwarnings("ignore:lost the connection")
def test_what_succeeds_in_between_starts_the_count_anew() -> None:
    attempts = Attempts("the text", (0,))
    for _ in range(3):
        attempts.failed(ConnectionError("gone"))
        attempts.succeeded()
    attempts.failed(ConnectionError("gone"))
    with pytest.raises(ConnectionError, match="2 times"):
        attempts.failed(ConnectionError("gone"))
