import pickle

import pytest

from lightsft import errors
from lightsft.errors import LightsftError, TargetError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LightsftError)]


def test_a_message_says_what_was_found_what_was_expected_and_what_to_do():
    error = TargetError("no x", expected="a y", todo="try z")
    assert str(error) == "no x\nExpected: a y\nWhat to do: try z"
    assert (error.found, error.expected, error.todo) == ("no x", "a y", "try z")


def test_parts_that_are_empty_are_left_out():
    assert str(TargetError("no x")) == "no x"
    assert str(TargetError("no x", todo="try z")) == "no x\nWhat to do: try z"


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_pickling_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("found", expected="expected", todo="todo")))
    assert type(error) is kind
    assert str(error) == str(kind("found", expected="expected", todo="todo"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_drawn_in_the_modules_tree(kind):
    assert kind.__name__ in errors.__doc__
