"""The config.json of every model that ships with the package."""

from importlib import resources
from pathlib import Path

from isomoe.models.causal_lm import CausalLM, HFConfig
from isomoe.models.registry import family_of, read_config


def known_configs() -> dict[str, HFConfig]:
    """All of them, by name."""
    folder = resources.files("isomoe") / "models" / "configs"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".json"):
            found[entry.name.removesuffix(".json")] = read_config(Path(str(entry)))
    return found


def shipped(family: type[CausalLM]) -> dict[str, HFConfig]:
    """Those of a family, by name."""
    return {name: config for name, config in known_configs().items() if family_of(config) is family}
