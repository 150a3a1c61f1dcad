"""An experiment's file of a run of seconds by the command line."""

from pathlib import Path


def write_experiment(folder: Path, fields: str, lines: str = "") -> Path:
    """A tiny DenseNet on rendered cells, in folder / "run"; `fields` are further ones of its Config, `lines` follow."""
    path = folder / "experiment.py"
    path.write_text(
        "from bmjax.config import *\n"
        "def config():\n"
        f"    return Config(name='cli', run_dir={str(folder / 'run')!r},\n"
        f"        data=DataConfig(image_size=32, synthetic_per_class=20, cache_dir={str(folder / 'cache')!r}),\n"
        "        model=ModelConfig(backbone='densenet_tiny', weights=None, head=HeadConfig(widths=(8,))),\n"
        f"        {fields})\n{lines}"
    )
    return path
