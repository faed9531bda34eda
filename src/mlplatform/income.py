"""The census-income table, under the names that the notebooks use; what reads it takes any table: see `table`.

Source: Adult, UCI Machine Learning Repository, B. Becker and R. Kohavi, 1996, CC BY 4.0,
https://doi.org/10.24432/C5XW20.
"""

from mlplatform import table
from mlplatform.table import check as check_income
from mlplatform.table import read as read_income
from mlplatform.table import split

__all__ = ["check_income", "read_income", "split"]

__getattr__ = table.names(
    __name__,
    COLUMNS=lambda described: described.columns,
    TARGET=lambda described: described.target.column,
    POSITIVE=lambda described: described.target.positive,
    NEGATIVE=lambda described: described.target.negative,
)
