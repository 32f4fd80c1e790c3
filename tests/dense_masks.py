"""The rule of who sees whom in a token tree, written out: [N, N], 1 = seen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trl.data.records import Segment


def dense_mask(segments: Sequence[Segment], window: int | None = None) -> Tensor:
    total = segments[-1].end
    seen = torch.zeros(total, total, dtype=torch.bool)
    for index, (start, end, _) in enumerate(segments):
        columns: list[int] = []
        link = index
        while link >= 0:
            columns = [*range(segments[link].start, segments[link].end), *columns]
            link = segments[link].parent
        rows = torch.ones(end - start, len(columns), dtype=torch.bool).tril(len(columns) - (end - start))
        if window is not None:
            rows = rows.triu(len(columns) - (end - start) - window + 1)
        seen[start:end, columns] = rows
    return seen
