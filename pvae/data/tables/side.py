"""Values beside x, of which covariates are made: columns, arrays or keys of `obs`, decoded as those of a table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pvae.data.rows.columns import Column
from pvae.data.rows.rows import Rows
from pvae.data.tables.cells import NA, CellDecoder
from pvae.errors import DataError, near


def side_rows(raw: Mapping[Any, Any], columns: Mapping[str, Column], rows: int, origin: str) -> Rows | None:
    """Return values beside x as a table of its own `(n, columns)`; None if there are no columns.

    Arguments:
        raw: arrays, tensors or columns of a data frame by name, `(n,)`; of real numbers also `(n, d)`, which are read
            as the columns `name[0]` .. `name[d - 1]`.
        columns: type of each value, by name.
        rows: number of rows, n.
        origin: name of the data in messages.

    Raises:
        DataError: a value is absent, has another length, or is none that its column allows; the message gives its row.
    """
    import pandas

    cells: dict[str, Any] = {}
    table: dict[str, Column] = {}
    for name, column in columns.items():
        if (of := column.of or name) not in raw:
            found = [str(key) for key in raw]
            raise DataError.of("data.side.absent", origin=origin, name=of, found=found, hint=near(of, found))
        values = raw[of].detach().cpu().numpy() if isinstance(raw[of], Tensor) else raw[of]
        parts = {name: values} if np.ndim(values) < 2 else {f"{name}[{i}]": v for i, v in enumerate(values.T)}
        if np.shape(values)[:1] != (rows,):
            raise DataError.of("data.side.length", origin=origin, name=of, rows=rows, shape=np.shape(values))
        cells |= {key: pandas.Series(part).reset_index(drop=True) for key, part in parts.items()}
        table |= dict.fromkeys(parts, column.model_copy(update={"of": None}))
    decoder = CellDecoder({}, None, NA, origin, side=table)
    decoder.decode(pandas.DataFrame(cells), "row {}".format)
    return None if decoder.beside is None else Rows(decoder.beside, None, {}, name=origin, table=table)
