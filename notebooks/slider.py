"""A number that changes a picture: one picture per value, and a slider over them.

The pictures are drawn when the cell runs and kept in its output, so that the slider moves on a page
without a kernel and without a network. Where HTML has no scripts all pictures stand below each other.
"""

import base64
import io
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from IPython.display import HTML
from PIL import Image

SHOW = (
    "const d=this.parentNode,i=+this.value;"
    "d.querySelectorAll('img').forEach((p,j)=>p.hidden=j!==i);"
    "d.querySelector('output').textContent=d.querySelectorAll('img')[i].alt"
)


def png(figure, dpi: int = 72, colours: int = 64) -> bytes:
    """The figure in a palette, which takes a third of the bytes."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, dpi=dpi, bbox_inches="tight", facecolor="white")
    Image.open(whole).convert("RGB").quantize(colours).save(small, "png", optimize=True)
    return small.getvalue()


def slider(name: str, values: Sequence, draw: Callable, start: int = 0) -> HTML:
    """`draw(value)` makes one figure. The value with index `start` is shown first."""
    pictures = []
    for i, value in enumerate(values):
        draw(value)
        text = base64.b64encode(png(plt.gcf())).decode()
        plt.close()
        hidden = "" if i == start else " hidden"
        pictures.append(
            f'<img alt="{name} = {value}" src="data:image/png;base64,{text}"{hidden}>'
        )
    first = f'<output>{name} = {values[start]}</output>'
    control = (
        f'<input type="range" min="0" max="{len(values) - 1}" value="{start}" '
        f'aria-label="{name}" oninput="{SHOW}">'
    )
    return HTML(f"<div>{control} {first}<br>{''.join(pictures)}</div>")
