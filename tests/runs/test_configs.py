"""Every configuration file composes, and makes what it says it makes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from controllers.learned import Learned
from controllers.policy import POLICIES_FOLDER
from engine.backends.torch.config import TorchEngineConfig
from engine.config import EngineConfig
from engine.latency.model import available_tables
from engine.models.shapes import llama_config, shape_named
from hydra_plugins.governor.sweeper import combine
from runs.evaluation import Evaluation
from runs.learning.distillation import Distillation
from runs.learning.training import Training
from runs.reporting.scores import ZERO

CONF = Path(__file__).resolve().parents[2] / "conf"
EVALUATE_GROUPS = ("engine", "workload", "controller", "actions", "logger", "experiment")
REAL_ENGINES = sorted(path.stem for path in (CONF / "engine").glob("torch_*.yaml"))
SIMULATED_ENGINES = sorted({path.stem for path in (CONF / "engine").glob("*.yaml")} - {*REAL_ENGINES, "vllm"})
CHOICES = [
    (str(path.parent.relative_to(CONF)), path.stem)
    for group in EVALUATE_GROUPS
    for path in sorted((CONF / group).rglob("*.yaml"))
]


def evaluation(*overrides: str) -> Evaluation:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("evaluate", list(overrides))
    made = instantiate(config, _convert_="all")
    assert isinstance(made, Evaluation)
    return made


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=lambda value: value)
def test_every_choice_of_every_group_composes_and_instantiates(group: str, name: str, tmp_path: Path) -> None:
    extra: list[str] = []
    if (group, name) in {("workload", "trace"), ("workload", "acceptance_log")}:
        extra = [f"workload.path={tmp_path / 'requests.csv'}"]
    elif (group, name) == ("workload/lengths", "file"):
        extra = ["workload=synthetic", f"workload.lengths.path={tmp_path / 'lengths.csv'}"]
    elif group.startswith("workload/"):
        extra = ["workload=synthetic"]
    evaluation(*extra, f"{group}={name}")


TRAIN_CHOICES = [
    (group, path.stem)
    for group in ("env", "learner", "curriculum", "logger")
    for path in sorted((CONF / group).glob("*.yaml"))
    if (group, path.stem) != ("env", "training")
]


@pytest.mark.parametrize(("group", "name"), TRAIN_CHOICES, ids=lambda value: value)
def test_every_choice_of_training_composes_and_instantiates(group: str, name: str) -> None:
    where = "curriculum@env.curriculum" if group == "curriculum" else group
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", [f"{where}={name}", "kind=made"])
    made = instantiate(config, _convert_="all")
    assert isinstance(made, Training)
    assert sum(made.env.shares().values()) == made.env.num_envs
    if group == "learner":
        # The file says what each setting is, so it must say all of them.
        own = {key for key in OmegaConf.to_container(config.learner) if key != "_target_"}  # type: ignore[union-attr]
        assert own == set(type(made.learner).model_fields)


def test_training_environments_hold_the_targets_of_the_suite() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        suite = compose("evaluate", ["experiment=bench"], return_hydra_config=True).hydra.sweeper.alternatives.load
    targets = {(load.engine, load["slo.ttft_target"], load["slo.tpot_target"]) for load in suite}
    trained = set()
    for path in (CONF / "env").glob("vicuna_*.yaml"):
        with initialize_config_dir(str(CONF), version_base=None):
            env = instantiate(compose("train", [f"env={path.stem}", "kind=made"]).env, _convert_="all")
        trained |= {(s.engine.name, s.slo.ttft_target, s.slo.tpot_target) for s in env.scenarios.values()}
    assert trained == targets


@pytest.mark.parametrize("engine", [name for name in SIMULATED_ENGINES if name.startswith("vicuna")])
def test_every_vicuna_has_a_small_policy_that_fits_the_standard_choices(engine: str) -> None:
    made = evaluation(f"engine={engine}", "controller=learned")
    assert isinstance(made.controller, Learned)
    assert made.controller.policy_file.header.actions == made.actions
    assert (POLICIES_FOLDER / f"{engine}.npz").stat().st_size < 200_000
    # An H100 has its A100's.
    assert made.controller.policy_file.header.trained["engines"] == [engine.replace("h100", "a100")]


@pytest.mark.parametrize("controller", ["analytic", "goodput"])
def test_distillation_composes_and_instantiates(controller: str) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        made = instantiate(compose("distill", [f"controller={controller}"]), _convert_="all")
    assert isinstance(made, Distillation)


@pytest.mark.parametrize("name", SIMULATED_ENGINES)
def test_an_engine_file_is_named_after_its_engine_and_the_engine_fits(name: str) -> None:
    from runs.evaluation import load_latency

    engine = evaluation(f"engine={name}").engine
    assert isinstance(engine, EngineConfig)
    assert engine.name == name
    assert engine.limits(load_latency(engine.latency)).total_blocks * engine.block_size > 1000


def test_every_shipped_latency_table_has_an_engine() -> None:
    assert set(SIMULATED_ENGINES) == set(available_tables())


def _shapes(target: str, drafter: str, num_kv_blocks: int) -> dict[str, str | int]:
    models = {"target": f"shape:{target}", "drafter_model": f"shape:{drafter}"}
    return {**models, "dtype": "bfloat16", "num_kv_blocks": num_kv_blocks}


OWN_SETTINGS: dict[str, dict[str, str | int]] = {
    "torch_tiny": {"num_kv_blocks": 4096},
    "torch_small": {"num_kv_blocks": 4096, "layers": 24},
    "torch_vicuna_7b": _shapes("vicuna_7b", "llama_68m", 8192),
    "torch_vicuna_13b": _shapes("vicuna_13b", "llama_160m", 6144),
    "torch_vicuna_33b": _shapes("vicuna_33b", "llama_160m", 2048),
}


@pytest.mark.parametrize(("name", "own"), OWN_SETTINGS.items(), ids=OWN_SETTINGS)
def test_a_real_engine_lists_every_setting_with_its_default(name: str, own: dict[str, str | int]) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        config = OmegaConf.to_container(compose("evaluate", [f"engine={name}"]).engine)
    assert isinstance(config, dict)
    assert config.pop("_target_") == f"{TorchEngineConfig.__module__}.{TorchEngineConfig.__name__}"
    assert config == TorchEngineConfig(name=name).model_dump(mode="json") | own
    assert set(REAL_ENGINES) == set(OWN_SETTINGS)


@pytest.mark.parametrize("name", [name for name in REAL_ENGINES if "vicuna" in name])
def test_an_engine_of_a_vicuna_shape_leaves_room_on_an_h200(name: str) -> None:
    """Of its 141 GB, 20 for logits, graphs and what a forward holds."""
    engine = evaluation(f"engine={name}").engine
    assert isinstance(engine, TorchEngineConfig)
    size = 0
    for source in (engine.target, engine.drafter_model):
        shape = shape_named(source)
        assert shape is not None
        config = llama_config(shape)
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(config).parameters()
            size += 2 * sum(weight.numel() for weight in weights)
        size += 2 * 2 * shape.layers * shape.hidden * engine.limits.total_blocks * engine.block_size
    assert size < 121e9


def test_engines_that_compute_or_cost_otherwise_are_called_otherwise() -> None:
    variants = {
        engine.variant
        for overrides in ([], ["engine.drafter=ngram"], ["engine.dtype=bfloat16"], ["engine.threads=2"])
        for engine in [evaluation("engine=torch_tiny", *overrides).engine]
        if isinstance(engine, TorchEngineConfig)
    }
    assert variants == {
        "torch_tiny", "torch_tiny drafter=ngram", "torch_tiny dtype=bfloat16", "torch_tiny threads=2"
    }  # fmt: skip
    roomier = evaluation("engine=torch_small", "engine.max_num_seqs=8", "engine.profile=engine.yaml").engine
    assert isinstance(roomier, TorchEngineConfig)
    assert roomier.variant == "torch_small"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "controller").glob("*.yaml")))
def test_a_controller_file_lists_every_setting_with_its_default(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / "controller" / f"{name}.yaml"), resolve=True)
    assert isinstance(config, dict)
    kind = get_class(str(config.pop("_target_")))
    settings = [field.name for field in dataclasses.fields(kind) if field.init]
    assert sorted(map(str, config)) == sorted(settings)
    made, default = kind(**{str(key): value for key, value in config.items()}), kind()
    for name in settings:
        assert getattr(made, name) == getattr(default, name), name


@pytest.mark.parametrize("name", ["quick", "poster_speculation", "poster_chunked_prefill", "bench"])
def test_the_jobs_of_an_experiment_are_different_runs(name: str) -> None:
    jobs = jobs_of(name)
    assert len({tuple(job) for job in jobs}) == len(jobs)
    assert any("controller=analytic" in job for job in jobs)
    assert any("controller=fixed" in job for job in jobs)
    assert all(sum(text.startswith("controller=") for text in job) == 1 for job in jobs)
    # One job of every controller is enough to know that its keys exist.
    for controller in ("fixed", "poster", "analytic"):
        evaluation(*next(job for job in jobs if f"controller={controller}" in job))


def test_the_suite_has_eighteen_scenarios_of_one_name_one_engine_and_one_pair_of_targets() -> None:
    jobs = [dict(text.split("=", 1) for text in job) for job in jobs_of("bench")]
    scenarios = {job["scenario"] for job in jobs}
    kinds = ("idle", "near-saturation", "diurnal", "bursts", "long-prompts", "code")
    assert scenarios == {f"{size}/{kind}" for size in ("7b", "13b", "33b") for kind in kinds}
    fixed = ("engine", "workload", "workload.rate_scale", "slo.ttft_target", "slo.tpot_target")
    assert len({tuple(job[key] for key in ("scenario", *fixed)) for job in jobs}) == len(scenarios)
    for job in jobs:
        size, kind = job["scenario"].split("/")
        assert job["engine"] == f"vicuna_{size}_a100"
        assert job["workload"] == f"bench_{kind.replace('-', '_')}"
    assert {job["seed"] for job in jobs} == set("01234")


def test_every_run_of_a_scenario_in_the_suite_has_its_own_name_and_the_scenarios_targets() -> None:
    jobs = [job for job in jobs_of("bench", "seed=0") if "scenario=13b/code" in job]
    assert sum("controller=fixed" in job for job in jobs) == 2
    totals = {
        tuple(text for text in job if "candidates" in text or "total" in text)
        for job in jobs
        if "controller=sarathi" in job
    }
    assert len(totals) == 9 * 4
    made = [evaluation(*(text.replace("\\{", "{").replace("\\}", "}") for text in job)) for job in jobs]
    labels = [one.label or one.controller.label() for one in made]
    assert len(set(labels)) == len(labels)
    assert {ZERO, "fixed c=3 n=256", "sarathi 512", "sarathi 2048", "analytic", "goodput n=512"} <= set(labels)
    assert {one.slo.ttft_target for one in made} == {3.0}
    assert {getattr(one.controller, "ttft_target", 3.0) for one in made} == {3.0}


def test_the_command_line_narrows_an_experiment() -> None:
    assert {text for job in jobs_of("quick", "controller=analytic") for text in job if "controller" in text} == {
        "controller=analytic"
    }
    jobs = jobs_of("quick", "controller=fixed", "controller.candidates=3", "seed=9")
    assert {text for job in jobs for text in job if "candidates" in text} == {"controller.candidates=3"}
    assert {text for job in jobs for text in job if "seed" in text} == {"seed=9"}
    elsewhere = jobs_of("quick", "workload=poisson_arxiv", "controller=poster")
    assert {text for job in elsewhere for text in job if text.startswith("workload")} == {"workload=poisson_arxiv"}


def test_without_alternatives_a_sweep_is_hydras_own() -> None:
    arguments = ["seed=0,1", "controller=poster,analytic", "engine=vicuna_7b_a100"]
    ours = combine({}, [], arguments, _loader())
    (theirs,) = BasicSweeper.split_arguments(_parsed(arguments), None)
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


def jobs_of(experiment: str, *arguments: str) -> list[list[str]]:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("evaluate", [f"experiment={experiment}"], return_hydra_config=True)
    sweeper = instantiate(config.hydra.sweeper)
    return combine(sweeper.params, sweeper.axes, [f"experiment={experiment}", *arguments], _loader())


def _loader():  # type: ignore[no-untyped-def]
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("evaluate", create_config_search_path(str(CONF)))
    GlobalHydra.instance().clear()
    return hydra.config_loader


def _parsed(arguments: list[str]):  # type: ignore[no-untyped-def]
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create(config_loader=_loader()).parse_overrides(arguments)
