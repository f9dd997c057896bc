"""A name of the library between backticks, on a page or in a tutorial, leads to its reference."""

from typing import TYPE_CHECKING

from docutils import nodes
from reference import ROOMS, public, tables
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# Where rooms share a name the page decides.
PAGES = {
    "variational": ("variational", "latents", "choices", "01_elbo", "08_latents"),
    "transport": ("transport", "02_sinkhorn"),
    "adversarial": ("adversarial", "03_from_f_divergence_to_wgan"),
    "diffusion": ("diffusion", "04_score_and_denoiser"),
    "flows": ("flows", "images", "05_flows", "10_few_steps"),
    "autoregressive": ("autoregressive", "06_autoregressive"),
    "state_space": ("state_spaces", "07_state_spaces"),
    "alignment": ("alignment", "09_alignment"),
    "training": ("training", "distributed", "accelerators"),
    "metrics": ("data_and_metrics",),
}


def homes() -> dict[str, list[str]]:
    """The rooms that have a name, by name."""
    found: dict[str, list[str]] = {}
    for room in ROOMS:
        names = [name for name, _ in public(f"genjax.{room}")]
        for name in [*names, *tables(f"genjax.{room}")]:
            found.setdefault(name, []).append(room)
    return found


HOMES = homes()


def target(text: str, page: str) -> str | None:
    """The full name of what stands between backticks, with or without its call."""
    name = text.partition("(")[0].removeprefix("genjax.")
    room, _, short = name.rpartition(".")
    rooms = HOMES.get(short, [])
    if room:
        return f"genjax.{name}" if room in rooms else None
    here = [r for r in rooms if page.rpartition("/")[2] in PAGES.get(r, ())]
    plain = short.isalpha() and short.islower()  # a word, which may mean something else
    if len(here or rooms) == 1 and (here or not plain):
        return f"genjax.{(here or rooms)[0]}.{short}"
    return None


class Names(SphinxPostTransform):
    """Literal text on the written pages; signatures and docstrings have links of their own."""

    default_priority = 5

    def run(self, **kwargs) -> None:
        page = self.env.docname
        if page.startswith("reference/"):
            return
        for node in list(self.document.findall(nodes.literal)):
            inside = isinstance(node.parent, (nodes.reference, addnodes.pending_xref, nodes.title))
            full = None if inside else target(node.astext(), page)
            if full:
                link = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=full, refdoc=page, refwarn=True
                )
                node.replace_self(link)
                link += node


def setup(app: "Sphinx") -> dict[str, bool]:
    app.add_post_transform(Names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
