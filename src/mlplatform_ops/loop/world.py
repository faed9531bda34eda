"""The world of the loop: people as the table knows them, and people after the world has moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mlplatform import income

COLUMN = "Occupation"
OCCUPATIONS = ("Farming-fishing", "Protective-serv", "Tech-support", "Transport-moving")  # of 2 to 5 % of the people
SHARE = 0.05  # of all people, who change to the one that booms
WELL_PAID = 0.65  # share of those in it who then earn above 50,000 dollars, whoever they are


@dataclass(frozen=True)
class World:
    """Draws people; its seed decides whom, and which occupation booms.

    Attributes:
        frame: The income table.
        seed: Any number.
    """

    frame: pd.DataFrame
    seed: int

    @property
    def occupation(self) -> str:
        """The occupation that booms."""
        return OCCUPATIONS[self.seed % len(OCCUPATIONS)]

    def batch(self, rows: int, *, moved: bool, stream: int) -> pd.DataFrame:
        """Draw a batch with its labels, which in practice arrive later.

        Args:
            rows: How many people; one may be drawn twice.
            moved: Whether the world has moved.
            stream: Tells batches of one seed apart.
        """
        rng = np.random.default_rng([self.seed, stream])
        drawn = self.frame.iloc[rng.integers(0, len(self.frame), rows)].reset_index(drop=True)
        return self._move(drawn, rng) if moved else drawn

    def window(self) -> pd.DataFrame:
        """Give the labelled rows of the time after the world moved, as many as the table has.

        The champion was trained on most of these people as they were before, which can only be to its advantage.
        """
        rng = np.random.default_rng([self.seed, 0])
        return self._move(self.frame.iloc[rng.permutation(len(self.frame))].reset_index(drop=True), rng)

    def _move(self, frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        """Let some of all people change to the occupation that booms, and most of those in it earn well."""
        changed = rng.random(len(frame)) < SHARE
        occupation = frame[COLUMN].mask(changed, self.occupation)
        earns = np.where(rng.random(len(frame)) < WELL_PAID, income.POSITIVE, income.NEGATIVE)
        return frame.assign(
            **{
                COLUMN: occupation,
                income.TARGET: frame[income.TARGET].mask(occupation == self.occupation, pd.Series(earns)),
            }
        )
