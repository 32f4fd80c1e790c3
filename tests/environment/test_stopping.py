import torch

from trl.environment.base_environment import StringStoppingCriteria


class Letters:
    """Decodes 1 to 'a', 2 to 'b', ..."""

    def batch_decode(self, rows):
        return ["".join(chr(96 + int(token)) for token in row) for row in rows]


def test_stops_when_all_rows_are_done_and_arms_again():
    stopping = StringStoppingCriteria(["cd", "x"], Letters())
    prompt = [3, 4]  # the prompt's own "cd" does not count
    rows = [[*prompt, 1, 3, 4, 1], [*prompt, 1, 1, 1, 24]]
    verdicts = [stopping(torch.tensor(rows)[:, : 3 + step], None) for step in range(4)]
    assert verdicts == [False, False, False, True]
    assert stopping.generated_tokens == [3, 4]
    assert stopping.first_call
    assert stopping(torch.tensor([[24]]), None)
    assert stopping.generated_tokens == [1]


def test_counts_one_too_many_where_no_stop_string_came():
    stopping = StringStoppingCriteria(["x"], Letters())
    assert [stopping(torch.tensor([[9, 1, 1]])[:, :end], None) for end in (2, 3)] == [False, False]
    assert stopping.generated_tokens == [3]
