"""`data.swap_columns`: a row has two prompts, with two of its columns in either order."""

from __future__ import annotations

from array import array

from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.records import InputRow, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.templates.template import RowTemplate


def check_swap(data: DataConfig, sampling: SamplingConfig) -> tuple[str, str]:
    """The two columns of data.swap_columns."""
    template = None if data.template is None else RowTemplate(data.template)
    names = data.swap_columns or []
    if len(names) != 2 or len(set(names)) != 2:
        raise BatchmixError(f"data.swap_columns={names}: must be two columns")
    if template is None or not template.variables.issuperset(names):
        raise BatchmixError(f"data.swap_columns={names}: needs a data.template that names both columns")
    if sampling.n < 2:
        raise BatchmixError(f"data.swap_columns={names}: needs sampling.n of at least 2, a sample for each order")
    return names[0], names[1]


def swapped(row: InputRow, first: str, second: str) -> InputRow:
    columns = row.columns | {first: row.columns.get(second), second: row.columns.get(first)}
    return InputRow(row.row, row.id, columns, row.sampling, row.error, row.text, row.key)


def pair_up(plain: list[Prompt], swapped: list[Prompt]) -> list[Prompt]:
    """The prompts of each row's two orders; one of them, as an error, where either cannot be run."""
    prompts = []
    for one, other in zip(plain, swapped, strict=True):
        if one.error is None and other.error is None and one.sampling.n < 2:
            one.error = "the row's own sampling.n is 1, and data.swap_columns needs a sample for each order"
        elif one.error is None:
            one.error = other.error
        if one.error is not None:
            one.token_ids = array("i")
            prompts.append(one)
            continue
        one.samples = range(0, one.sampling.n, 2)
        other.samples, other.columns = range(1, one.sampling.n, 2), one.columns
        prompts += [one, other]
    return prompts
