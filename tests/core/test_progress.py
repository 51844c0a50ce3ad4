from harness.core.progress import EVERY_SECONDS, Steps


def test_a_step_is_told_when_it_begins_and_again_after_a_while() -> None:
    told: list[str] = []
    progress = Steps()
    progress.note("a window")  # nobody listens
    progress.tell_to(told.append)
    for step in ("a tensor", "a tensor", "a window", "a tensor"):
        progress.note(step)
    assert told == ["a tensor", "a window", "a tensor"]
    progress._told -= EVERY_SECONDS
    progress.note("a tensor")
    assert told[-2:] == ["a tensor", "a tensor"]
