"""A choice of a config group may be a file of one's own: `engine=out/profile/engine.yaml`."""

from pathlib import Path
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from yaml import YAMLError

SUFFIX = ".yaml"
MAIN = "main"
"""Hydra's name for where the application's own configuration is."""


class OwnFiles(ConfigSource):
    """Finds `GROUP=PATH.yaml`, the path absolute or relative to the working directory.

    Only a choice that ends in `.yaml` is taken for a path, so names of the application's choices mean what they did.
    What such a file's own defaults list names is found where it always is. A path to no file is refused by its name,
    with what the group has.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        kind = SourcesRegistry.instance().resolve(_scheme(self.path))
        self.application: ConfigSource = kind(MAIN, self.path)

    @staticmethod
    def scheme() -> str:
        """What this source's entry in Hydra's search path begins with; the application's own path follows."""
        return "own-files"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read the file. Raises ConfigCompositionException when there is none, or it is no YAML mapping."""
        group, path = self._file(config_path)
        if not path.is_file():
            known = ", ".join(self.application.list(group, ObjectType.CONFIG)) or "none"
            raise ConfigCompositionException(
                f"{group}={path}: no such file (from {Path.cwd()}); give a path to a .yaml file, or one of: {known}"
            )
        try:
            text = path.read_text(encoding="utf-8")
            config: Any = OmegaConf.create(text)
            if not OmegaConf.is_dict(config):
                raise ValueError("it holds no mapping of keys to values")
        except (OSError, ValueError, YAMLError) as error:
            raise ConfigCompositionException(f"{group}={path}: cannot be read as a configuration: {error}") from error
        return ConfigResult(
            provider=self.provider, path=str(path), config=config, header=ConfigSource._get_header_dict(text)
        )

    def is_config(self, config_path: str) -> bool:
        """Whether this is GROUP/PATH.yaml and not a choice of the application's own."""
        if not config_path.endswith(SUFFIX) or "/" not in config_path:
            return False
        return self._file(config_path)[1].is_file() or not self.application.is_config(config_path)

    def is_group(self, config_path: str) -> bool:
        """Groups are the application's."""
        return False

    def available(self) -> bool:
        """Always."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Nothing: the choices of a group are those that come with the application."""
        return []

    def _file(self, config_path: str) -> tuple[str, Path]:
        """The group and the path that Hydra joined with a slash, told apart by which groups and which files exist."""
        parts = config_path.split("/")
        # A group has a plain name: what begins with / or . is the path.
        most = next((i for i, part in enumerate(parts) if part in ("", ".", "..")), len(parts) - 1)
        splits = [("/".join(parts[:i]), Path("/".join(parts[i:])).expanduser()) for i in range(1, most + 1)]
        splits = [split for split in splits if self.application.is_group(split[0])] or splits[:1]
        there = [split for split in splits if split[1].is_file()]
        if len(there) > 1:
            found = " and ".join(f"{group}={path}" for group, path in there)
            raise ConfigCompositionException(f"{config_path}: {found} are both there; give an absolute path")
        return (there or splits)[0]


class OwnFilesSearchPath(SearchPathPlugin):
    """Puts `OwnFiles` before the application's configuration, so that a path means the file that it names."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra."""
        for element in search_path.get_path():
            if element.provider == MAIN:
                search_path.prepend("own-files", f"{OwnFiles.scheme()}://{element.path}")
                return


def _scheme(path: str) -> str:
    return path.split("://", 1)[0] if "://" in path else "file"
