"""Sample a run again, finished or not: a picture and the samples, of text the text.

    python -m experiments.sample runs/diffusion/1
    python -m experiments.sample runs/diffusion/1 --sampler unipc --num-steps 9 --guidance 2
    python -m experiments.sample runs/flow/3 --num-samples 100 --seed 7 --raw
    python -m experiments.sample runs/language_model/1 --temperature 0.8 --out some.txt

Nothing is trained, and the run's folder stays as it is but for the new files. As many samples as
the run leaves, from its own seed and with no option given, are the run's own.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional

from experiments import _panels, _pictures, _run
from experiments._system import Measures, reopen
from genjax import checks
from genjax.training import Checkpoints

# Fields of an experiment's Config that only sampling depends on, where it has them.
OPTIONS = ("sampler", "num_steps", "spacing", "guidance", "truncation", "by", "temperature",
           "top_k", "top_p", "min_p")  # fmt: skip
ALSO = {"num_steps": "sample_steps"}  # the name that one of them has elsewhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is sampled and how; options of sampling that are not given are those of the run."""

    run: Positional[str]
    """Folder of the run."""
    num_samples: int | None = None
    """How many (default: as many as the run leaves)."""
    seed: int | None = None
    """Seed of the samples (default: the run's)."""
    raw: bool = False
    """The weights as the last step left them (default: averaged, as the run reports them)."""
    out: str | None = None
    """File of the samples, .npy or .txt; the picture lies beside it (default: again.npy in the
    run's folder)."""
    data_dir: str | None = None
    """Folder of the prepared data sets, where it is another one now."""
    sampler: str | None = None
    """Sampler (diffusion)."""
    num_steps: int | None = None
    """Steps of the sampler."""
    spacing: str | None = None
    """How the sampler's times are spaced (diffusion)."""
    guidance: float | None = None
    """Scale of classifier-free guidance."""
    truncation: float | None = None
    """How far styles go from their mean (stylegan)."""
    by: str | None = None
    """Which tokens a step reveals (masked_diffusion)."""
    temperature: float | None = None
    """Of what is drawn, 1 being the model's own law."""
    top_k: int | None = None
    """So many most probable tokens (language_model)."""
    top_p: float | None = None
    """The most probable tokens with that much together (language_model)."""
    min_p: float | None = None
    """Tokens at least so probable, beside the most probable one (language_model)."""


def main(config: Config) -> dict[str, Any]:
    """Reopen, sample, write; returns where the files are and what was sampled."""
    if config.num_samples is not None:
        checks.integer("num_samples", config.num_samples, 1)
    whole = Path(config.run).absolute()
    folder = trained_in(whole)
    changes = given(config, folder)
    system, params, run = reopen(folder, averaged=not config.raw, **changes)
    module = sys.modules[type(run).__module__]
    if system.sample is None:
        raise _run.RunError(f"{folder} is of {module.__name__}, which samples nothing")
    data = module.load_data(run)
    count = config.num_samples or system.count or data.count
    labels = None if system.labels is None else jnp.resize(system.labels, (count,))
    asked = dataclasses.replace(run, seed=run.seed if config.seed is None else config.seed)
    samples = np.asarray(
        Measures(asked, system._replace(count=count, labels=labels), data).sample(params)
    )
    place = Path(config.out).absolute() if config.out else folder / "again.npy"
    place.parent.mkdir(parents=True, exist_ok=True)
    np.save(place.with_suffix(".npy"), samples)
    texts = module.texts(run, samples) if data.kind == "tokens" and hasattr(module, "texts") else []
    if texts:
        _run.write_texts(place.with_suffix(".txt"), texts)
    own = {name: value for name, value in changes.items() if name not in ("data_dir", "devices")}
    name = "/".join([*whole.parts[-2:], *folder.relative_to(whole).parts])
    title = f"{len(samples)} samples of {name}, {step_of(folder, system)}\n"
    title += ", ".join(f"{k} {v}" for k, v in {"seed": asked.seed, **own}.items())
    title += ", raw weights" if config.raw else ""

    def plot(axes: Any) -> None:
        if texts:
            _panels.show_text(axes[0], texts)
        else:
            high = float((data.spec.levels or 2) - 1) if samples.dtype.kind in "iu" else 1.0
            _panels.show_samples(axes[0], samples, labels, high=high)

    what, _, how = title.partition("\n")
    _pictures.save_figure(place.with_suffix(".png"), plot, title=what, of=how, size=5.0)
    print("\n".join([*texts[:8], title]), f"in {place.with_suffix('')}.npy and .png", sep="\n")
    return {"samples": place.with_suffix(".npy"), "title": title, "texts": texts}


def trained_in(folder: Path) -> Path:
    """The folder of the training: the run's own, or the last of those inside it."""
    inside = [path.parent for path in folder.glob("*/config.json")]
    if not inside or (folder / "checkpoints").exists() or (folder / "params.npz").exists():
        return folder
    return max(inside, key=lambda path: (path / "config.json").stat().st_mtime)


def given(config: Config, folder: Path) -> dict[str, Any]:
    """The fields of the run's Config that the command line changes. Raises RunError for an option
    that the run has not, naming those that it has."""
    stored = _run.read_config(folder / "config.json", "give a run's folder")
    changes: dict[str, Any] = {} if config.data_dir is None else {"data_dir": config.data_dir}
    if (stored.get("devices") or 0) > jax.device_count():  # the run's machine had more
        changes["devices"] = None
    names = {name: ALSO.get(name, name) if name not in stored else name for name in OPTIONS}
    for name, field in names.items():
        value = getattr(config, name)
        if value is not None and field not in stored:
            having = ", ".join(name for name, field in names.items() if field in stored)
            raise _run.RunError(
                f"{folder} is of {stored.get('experiment')}, whose samples have no {name}: "
                f"{f'they have {having}' if having else 'they have no options'}"
            )
        changes |= {} if value is None else {field: value}
    return changes


def step_of(folder: Path, system: Any) -> str:
    """At which step the weights are that `reopen` gives."""
    ended = _panels.summary(folder)
    steps = Checkpoints(folder / "checkpoints").steps()
    if system.best is not None and "best_step" not in ended:
        return "its best step so far"
    done = steps[-1] if steps else ended.get("steps_done", 0)
    return f"step {done if system.best is None else ended['best_step']}"


if __name__ == "__main__":
    _run.launch(main, Config)
