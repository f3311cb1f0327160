"""Workloads by the names that the apps' `workload=NAME` has: the choices of `conf/workload`."""

from engine.workload.source import WorkloadSource


def named_workload(name: str) -> WorkloadSource:
    """The source that `conf/workload/NAME.yaml`, or a yaml file of one's own, describes.

    Raises:
        ValueError: no such name, or a source with a setting that must be given or is refused.
    """
    # Only a workload that is named needs Hydra.
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from conf.compose import compose_choice

    config = compose_choice("workload", name)
    try:
        wanted = sorted(key.removeprefix("workload.") for key in OmegaConf.missing_keys(config))
        if wanted:
            kind = str(config.get("_target_", "workload")).rpartition(".")[2]
            raise ValueError(f"no default for {', '.join(wanted)}: give a {kind}({wanted[0]}=...)")
        made = instantiate(config, _convert_="all")
        if not isinstance(made, WorkloadSource):
            raise ValueError(f"it describes a {type(made).__name__}, which is no workload")
    except (InstantiationException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(" ".join(f"workload={name}: {error.__cause__ or error}".split())) from error
    return made
