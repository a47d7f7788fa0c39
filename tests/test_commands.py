"""What the command lines share."""

from lib import commands


def stopped():
    raise KeyboardInterrupt


def test_a_command_that_is_stopped_ends_with_one_line(capsys):
    assert commands.until_stopped(stopped, "nothing is kept") == 130
    assert capsys.readouterr().err == "stopped: nothing is kept\n"
    assert commands.until_stopped(lambda: 3, "") == 3
