"""How the notebooks' figures look: one theme, colours that colour-blind readers can tell apart, and a text for each."""

from __future__ import annotations

from io import BytesIO

import plotnine as p9

# Okabe and Ito's: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def use_theme(dpi: int = 90) -> None:
    """Draw every later figure of this process black on white, with letters that stay legible in print.

    Args:
        dpi: Resolution, dots per inch.
    """
    text = p9.element_text(size=10)
    plain = p9.theme(figure_size=(7, 4), legend_position="bottom", text=text, dpi=dpi)  # type: ignore[no-untyped-call]
    p9.theme_set(p9.theme_bw() + plain)  # type: ignore[no-untyped-call]


def show(plot: p9.ggplot, alt: str) -> None:
    """Display a figure with a text that says what it shows, for readers who cannot see it; plotnine itself gives none.

    Args:
        plot: The figure.
        alt: One or two sentences.
    """
    from IPython.display import Image, display

    drawn = BytesIO()
    plot.save(drawn, format="png", verbose=False)
    display(Image(drawn.getvalue(), alt=alt))  # type: ignore[no-untyped-call]
