"""Mappings that the command line gives whole replace what was there, where Hydra merges them into it."""

from collections.abc import Iterable
from typing import Any, get_origin

import hydra.utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict


def replace(config: DictConfig, overrides: Iterable[str]) -> None:
    """Set every setting of type dict, such as a schedule, to what an override says that gives it whole.

    `+controller.slots={1: ...}` is then these slots and no others. Overrides of single entries behind it still apply.
    """
    whole: set[str] = set()
    with open_dict(config):
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key = override.key_or_group
            if override.is_delete() or override.is_sweep_override():
                continue
            value = override.value()
            if isinstance(value, dict) and _is_mapping(config, key):
                whole.add(key)
                OmegaConf.update(config, key, value, merge=False)
            elif any(key.startswith(f"{above}.") for above in whole):
                OmegaConf.update(config, key, value)


def _is_mapping(config: DictConfig, key: str) -> bool:
    """Whether the class that the key's section is made into takes a dict there."""
    above, _, last = key.rpartition(".")
    section = OmegaConf.select(config, above) if above else config
    target = section.get("_target_") if isinstance(section, DictConfig) else None
    fields: dict[str, Any] = getattr(hydra.utils.get_class(target), "__pydantic_fields__", {}) if target else {}
    return last in fields and get_origin(fields[last].annotation) is dict
