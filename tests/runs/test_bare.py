"""Claims about profiles where only torch, transformers, numpy, numba and scikit-learn are installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from packaging.requirements import Requirement

from conf.plain import merged, read_choice
from engine.backends.torch.config import TorchEngineConfig
from engine.config import EngineConfig
from engine.latency.measured import MeasuredIterations, read_provenance
from runs import bare, profile
from runs.bare_config import compose as compose_bare
from runs.bare_config import resolved
from runs.endings import MistakeError
from runs.evaluation import Evaluation, load_profile

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = ("torch", "transformers", "numpy", "numba", "scikit-learn")
APPS = {"hydra", "omegaconf", "pydantic", "rich", "pandas", "gymnasium", "wandb", "stable_baselines3"}
"""Refused even where something that is installed would bring them."""

SMALL = [
    "engine=torch_tiny",
    "device=cpu",
    "points=50",
    "minutes=1e-6",
    "actions.candidate_choices=[0,2]",
    "actions.budget_choices=[16,64]",
    "engine.name=small",
    "engine.max_num_seqs=4",
    "engine.max_model_len=128",
    "engine.num_kv_blocks=40",
    "predictor.trees=5",
    "speculation.prompts=3",
    "speculation.prompt_tokens=24",
    "speculation.max_tokens=12",
]

FINDER = """
import os
import sys
from importlib.machinery import PathFinder

REFUSED = frozenset(os.environ["REFUSED"].split(","))


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else super().find_spec(name, path, target)


sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def refused_packages() -> set[str]:
    """Every importable name that a machine with `INSTALLED` alone would not have."""
    found: set[str] = set()
    asked = list(INSTALLED)
    while asked:
        name = _plain(asked.pop())
        if name in found:
            continue
        try:
            needs = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue
        found.add(name)
        asked += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    own = {path.name for path in REPOSITORY.iterdir()}
    others = {
        name
        for name, distributions in packages_distributions().items()
        if name not in own and not {_plain(entry) for entry in distributions} & found
    }
    return others | APPS


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m runs.profile` where only a bare machine's packages can be imported."""
    folder = tmp_path_factory.mktemp("finder")
    (folder / "sitecustomize.py").write_text(FINDER)
    refused = refused_packages()
    assert {"hydra", "pydantic", "pyarrow", "matplotlib"} <= refused

    def start(*words: str, pyarrow: bool = False) -> subprocess.Popen[str]:
        names = refused - {"pyarrow"} if pyarrow else refused
        environment = os.environ | {"PYTHONPATH": str(folder), "REFUSED": ",".join(sorted(names))}
        arguments = [sys.executable, "-m", "runs.profile", *words]
        return subprocess.Popen(
            arguments,
            cwd=REPOSITORY,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Tests in the background of a shell ignore Ctrl-C, and their processes would with them.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


@pytest.fixture(scope="module")
def measured_folder(
    command: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A profile without pyarrow, interrupted and gone on with; what its last command said."""
    out = tmp_path_factory.mktemp("bare")
    visits = out / "visits.jsonl"
    first = command(*SMALL, f"hydra.run.dir={out}")
    while first.poll() is None and not (visits.exists() and visits.read_bytes().count(b"\n") > 5):
        try:
            first.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate()
    assert first.returncode == 130, said
    assert "interrupted: the same command goes on from here" in said
    kept = visits.read_bytes()
    assert (out / "machine.json").exists()
    again = command(*SMALL, f"hydra.run.dir={out}")
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert visits.read_bytes().startswith(kept)
    return out, said


def test_without_pyarrow_everything_else_is_there_and_the_command_for_the_rest(
    measured_folder: tuple[Path, str],
) -> None:
    out, said = measured_folder
    assert {path.name for path in out.iterdir()} == {
        "acceptance.jsonl",
        "agreement.npz",
        "card.json",
        "machine.json",
        "profile.log",
        "provenance.json",
        "table.json",
        "tokens_per_iteration.json",
        "visits.jsonl",
    }
    assert f"python -m runs.profile --finish {out}" in said
    assert "iterations.parquet and engine.yaml" in said


def test_a_copied_folder_is_finished_as_the_machine_that_measured_it_would(
    measured_folder: tuple[Path, str], call_app: Callable[..., int], tmp_path: Path
) -> None:
    measured = measured_folder[0]
    copy = shutil.copytree(measured, tmp_path / "copy")
    # The copy was measured elsewhere, and nobody here has its processor.
    machine = json.loads((copy / "machine.json").read_text()) | {"processor": "Another", "device": "NVIDIA H200"}
    (copy / "machine.json").write_text(json.dumps(machine))
    visits = (copy / "visits.jsonl").read_bytes()
    assert call_app(profile.main, "profile", "--finish", str(copy)) == 0
    assert (copy / "visits.jsonl").read_bytes() == visits
    assert load_profile(copy / "engine.yaml").measured == copy / "iterations.parquet"
    provenance = read_provenance(copy / "iterations.parquet")
    assert provenance == json.loads((copy / "provenance.json").read_text())
    assert (provenance["processor"], provenance["device"]) == ("Another", "NVIDIA H200")


def test_the_hydra_app_goes_on_from_a_bare_folder_and_simulates_it(
    measured_folder: tuple[Path, str], call_app: Callable[..., int], tmp_path: Path
) -> None:
    out = shutil.copytree(measured_folder[0], tmp_path / "out")
    finished = shutil.copytree(out, tmp_path / "finished")
    visits = (out / "visits.jsonl").read_bytes()
    assert call_app(profile.main, "profile", *SMALL, f"hydra.run.dir={out}") == 0
    assert (out / "visits.jsonl").read_bytes() == visits, "the engine, its machine and its points are the same"
    assert call_app(profile.main, "profile", "--finish", str(finished)) == 0
    for name in ("iterations.parquet", "card.json", "provenance.json", "table.json", "machine.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base=None):
        given = ["workload=synthetic", "workload/lengths=fixed", "workload.num_requests=20", "logger=none"]
        given += ["workload.lengths.prompt_tokens=40", "workload.lengths.output_tokens=20", "controller=fixed"]
        config = compose("evaluate", [f"engine={out / 'engine.yaml'}", *given, "engine.timing_error=0.1"])
        evaluation = instantiate(config, _convert_="all")
    assert isinstance(evaluation, Evaluation)
    assert evaluation.run().summary["requests_finished"] == 20


def test_with_pyarrow_a_bare_machine_leaves_a_whole_engine(
    command: Callable[..., subprocess.Popen[str]], measured_folder: tuple[Path, str], tmp_path: Path
) -> None:
    out = shutil.copytree(measured_folder[0], tmp_path / "out")
    process = command("--finish", str(out), pyarrow=True)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "Tokens per iteration  c=0: 1.00" in said
    assert len(MeasuredIterations.read(out / "iterations.parquet")) == 50
    config = load_profile(out / "engine.yaml")
    listed = compose_bare("profile", [f"engine={out / 'engine.yaml'}"])["engine"].keys() - {"_target_"}
    assert listed == EngineConfig.model_fields.keys(), "every setting can be given on a command line"
    chosen = {"name", "latency", "measured", "max_num_seqs", "max_model_len", "num_kv_blocks"}
    assert config.model_dump(exclude=chosen) == EngineConfig(name="", latency="").model_dump(exclude=chosen)


def test_a_folder_that_was_not_measured_to_its_end_cannot_be_finished(
    measured_folder: tuple[Path, str], call_app: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("machine.json", "visits.jsonl", "tokens_per_iteration.json"):
        out = shutil.copytree(measured_folder[0], tmp_path / name)
        (out / name).unlink()
        assert call_app(profile.main, "profile", "--finish", str(out)) == 2
        said = capsys.readouterr().err
        assert f"{name}: no such file" in said
        assert "on the machine that measures" in said
    assert call_app(profile.main, "profile", "--finish", str(out), "points=60") == 2


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("engine.devcie=cpu", "engine.devcie: unknown key; did you mean device?"),
        ("pionts=60", "pionts: unknown key; did you mean points?"),
        ("engine=torch_tny", "engine=torch_tny: no such file (from {here}); did you mean torch_tiny?"),
        ("engine=nowhere.yaml", "engine=nowhere.yaml: no such file"),
        ("device=gpu", "engine.device=gpu: must be one of auto, cpu, cuda"),
        ("engine.dtype=float8", "engine.dtype=float8: must be one of auto, float64"),
        ("engine.layers=many", "engine.layers=many: must be a whole number or null"),
        ("engine.mean_agreement=often", "engine.mean_agreement=often: must be a number or null"),
        ("engine.target=shape:vicuna_8b", "shape:vicuna_8b: no such shape; choose one of shape:vicuna_7b"),
        ("engine.max_num_seqs=0", "engine.max_num_seqs=0: must be above 0"),
        ("engine.watermark=-1", "engine.watermark=-1.0: must be above 0"),
        ("engine.fused=perhaps", "engine.fused=perhaps: must be true or false"),
        ("engine.prefill=turns", "profile with engine.prefill=chunked"),
        ("points=many", "points=many: must be a whole number"),
        ("points=49", "points=49 must be at least 50"),
        ("minutes=0", "minutes=0.0 must be above 0"),
        ("minutes=soon", "minutes=soon: must be a number"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("predictor.features=[weather]", "features=['weather'] must be some of"),
        ("predictor=line", "predictor=line: must be a section"),
        ("speculation.max_tokens=1", "speculation.max_tokens=1 must be at least 2"),
        ("actions.candidate_choices=[2,0]", "candidate_choices=[2, 0] must be strictly increasing"),
        ("actions.candidate_choices=[a]", "every entry must be a whole number"),
        ("actions.budget_choices=16", "actions.budget_choices=16: must be a list"),
        ("engine=vllm", "cannot be profiled without hydra-core, omegaconf and pydantic"),
        ("--multirun", "--multirun: without Hydra a word is key=value"),
        ("+engine.other=1", "+engine.other=1: without Hydra a word is key=value"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused_by_name(
    word: str, said: str, call_app: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        bare.main(profile.profile_arguments(sys.argv[1:]))

    assert call_app(main, "profile", f"hydra.run.dir={tmp_path}", word) == 2
    assert said.format(here=Path.cwd()) in capsys.readouterr().err
    assert not (tmp_path / "visits.jsonl").exists()


@pytest.mark.parametrize("words", [[], ["engine=torch_small"], ["engine=torch_vicuna_7b"], SMALL[3:]])
def test_the_bare_configuration_is_hydras(words: list[str]) -> None:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base=None):
        made = instantiate(compose("profile", words), _convert_="all")
    config = compose_bare("profile", words)
    subject, wanted = bare.configured(config)
    assert subject.settings == made.engine.model_dump(mode="json", exclude={"profile"})
    assert wanted.predictor == made.predictor
    assert vars(wanted.speculation) == made.speculation.model_dump()
    assert {key: tuple(value) for key, value in vars(wanted.actions).items()} == made.actions.model_dump()
    assert (wanted.minutes, wanted.points, wanted.seed) == (made.minutes, made.points, made.seed)
    assert config["hydra"]["run"]["dir"] == f"runs/outputs/profile/{made.engine.name}"


def test_an_engine_of_ones_own_begins_with_a_choice(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [torch_small, _self_]\nname: mine\nthreads: 2\n")
    settings = bare.configured(compose_bare("profile", [f"engine={own}", "engine.dtype=bfloat16"]))[0].settings
    assert {key: settings[key] for key in ("name", "threads", "layers", "dtype")} == {
        "name": "mine",
        "threads": 2,
        "layers": 24,
        "dtype": "bfloat16",
    }
    assert settings.keys() == TorchEngineConfig.model_fields.keys() - {"profile"}
    own.write_text("_target_: engine.backends.torch.config.TorchEngineConfig\nname: mine\n")
    with pytest.raises(MistakeError, match=r"max_num_seqs.* must be given without Hydra; begin the file with defaults"):
        bare.configured(compose_bare("profile", [f"engine={own}"]))


def test_mappings_are_merged_and_keys_interpolated() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}) == {"a": {"b": 4, "c": 2}, "d": 3}
    config = {"engine": {"name": "tiny", "seqs": 4}, "dir": "out/${engine.name}", "same": "${engine.seqs}"}
    assert resolved(config, config) == {"engine": config["engine"], "dir": "out/tiny", "same": 4}
    with pytest.raises(MistakeError, match=r"\$\{now:%Y\}: no such key"):
        resolved("${now:%Y}", config)
    assert read_choice("actions", "standard")["candidate_choices"] == list(range(9))
