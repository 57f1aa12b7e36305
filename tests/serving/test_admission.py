"""Who is let in, and what the others are told."""

import pytest

from jaxcls.errors import RequestError
from jaxcls.serving.admission import Admission


def make_admission(seconds_per_image=0.1, max_wait=1.0):
    return Admission(20, 1000, max_wait, lambda: seconds_per_image)


def refusal(admit, *arguments):
    with pytest.raises(RequestError) as caught, admit(*arguments):
        pass
    return caught.value.status, caught.value.retry_after


def test_images_and_bytes_are_counted_and_given_back():
    admission = make_admission()
    with admission.images(3), admission.bytes(400), admission.images(2):
        assert (admission.num_images, admission.num_bytes) == (5, 400)
    assert (admission.num_images, admission.num_bytes) == (0, 0)


def test_what_was_taken_in_is_given_back_after_an_error():
    admission = make_admission()
    with pytest.raises(ZeroDivisionError), admission.images(3), admission.bytes(5):
        raise ZeroDivisionError
    assert (admission.num_images, admission.num_bytes) == (0, 0)


def test_a_full_queue():
    admission = make_admission(max_wait=100)
    with admission.images(19):
        with admission.images(1):
            assert refusal(admission.images, 1) == (429, 2)
            with pytest.raises(RequestError):
                admission.require_room()
        assert refusal(admission.images, 2) == (429, 2)
        admission.require_room()
    assert refusal(admission.images, 21) == (413, None)


def test_too_many_bytes():
    admission = make_admission()
    with admission.bytes(900):
        assert refusal(admission.bytes, 101) == (429, 1)
        with admission.bytes(100):
            pass


def test_a_wait_beyond_the_deadline():
    """11 images of 0.1 s are 1.1 s; a single one that waits for nobody is always let in."""
    admission = make_admission()
    with admission.images(10), admission.images(1):
        assert refusal(admission.images, 1) == (429, 2)
    slow = make_admission(seconds_per_image=7.0)
    with slow.images(1):
        assert refusal(slow.images, 1) == (429, 7)


def test_nothing_is_taken_in_once_it_is_closed():
    admission = make_admission()
    with admission.images(1):
        admission.is_closed = True
        assert refusal(admission.images, 1) == (503, 1)
        assert refusal(admission.bytes, 1) == (503, 1)
    assert admission.num_images == 0
