"""Claims about readers, composition and the shipped tables against the measured profiles."""

from pathlib import Path

import numpy as np
import pytest

from engine.latency import build, compose, holdout, profiles, validate
from engine.latency.compose import Curve
from engine.latency.estimates import Estimates
from engine.latency.model import TABLES_FOLDER
from engine.latency.profiles import AttentionProfile, ProfileError
from engine.latency.shapes import gpu_spec, model_shape


@pytest.fixture(scope="session")
def profile_dir(data_dir: Path) -> Path:
    folder = data_dir / "profiles"
    if not folder.is_dir():
        pytest.skip(f"no operator profiles at {folder}")
    return folder


def test_shapes_have_the_published_sizes() -> None:
    # 6.74, 13.0 and 32.5 billion parameters of two bytes
    sizes = [model_shape(f"vicuna_{size}").weight_bytes / 2e9 for size in ("7b", "13b", "33b")]
    assert sizes == pytest.approx([6.738, 13.016, 32.529], abs=0.002)
    assert model_shape("vicuna_7b").kv_bytes_per_token == 2 * 2 * 32 * 4096
    assert model_shape("llama3_8b").kv_bytes_per_token == 2 * 2 * 32 * 8 * 128
    assert model_shape("llama_68m").weight_bytes / 2e6 == pytest.approx(68, abs=1)
    with pytest.raises(ValueError, match="vicuna_7b"):
        model_shape("vicuna")


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"mlp\.csv: no such profile file"):
        profiles.read_vidur_dense(tmp_path / "mlp.csv")
    path = tmp_path / "gemm.csv"
    path.write_text("m,n,k\n1,2,3\n")
    with pytest.raises(ProfileError, match=r"gemm\.csv: column 'latency' is missing"):
        profiles.read_gemm(path)
    path.write_text("m,n,k,latency\n1,2,3,0.5\n1,2,4,-1\n")
    with pytest.raises(ProfileError, match=r"gemm\.csv: line 3: column 'latency'"):
        profiles.read_gemm(path)


def test_the_cache_write_artefact_of_prefill_rows_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "attention.csv"
    path.write_text(
        "time_stats.attn_prefill.median,time_stats.attn_decode.median,time_stats.attn_kv_cache_save.median,"
        "batch_size,prefill_chunk_size,kv_cache_size,is_prefill\n"
        "0.5,0,3.3,1,4096,0,True\n"
        "0,0.1,0.004,8,0,512,False\n"
    )
    profile = profiles.read_vidur_attention(path)
    assert sorted(profile.seconds) == pytest.approx([0.104e-3, 0.5e-3])


def test_a_jump_is_put_after_the_tile_and_a_slope_stays_a_slope() -> None:
    curve = compose.with_steps(Curve(np.array([64.0, 128, 144, 160]), np.array([1.0, 1.01, 1.5, 1.52])))
    assert np.interp([128, 129, 136, 144], curve.nodes, curve.seconds) == pytest.approx([1.01, 1.5, 1.5, 1.5])
    assert np.interp(96, curve.nodes, curve.seconds) == pytest.approx(1.005)
    coarse = compose.with_steps(Curve(np.array([512.0, 768]), np.array([2.0, 3.0])))
    assert np.interp([512, 513, 640, 641, 768], coarse.nodes, coarse.seconds) == pytest.approx([2, 2.5, 2.5, 3, 3])


def test_half_the_heads_is_half_the_requests() -> None:
    nodes, surface = np.array([1, 2, 4]), np.array([[1.0], [2.0], [4.0]])
    assert compose.scale_heads(surface, nodes, np.array([2, 4, 8]), 0.5).ravel() == pytest.approx([1, 2, 4])
    assert compose.scale_heads(surface, nodes, np.array([8]), 1.0).ravel() == pytest.approx([8])


def test_prefill_with_context_is_recovered_from_base_and_slope() -> None:
    chunk = np.repeat([64, 128, 256], 4)
    context = np.tile([0, 256, 1024, 2048], 3)
    seconds = np.where(context == 0, 1e-5, 2e-5 + 1e-8 * chunk + 1e-10 * chunk * context)
    none = np.zeros(12, dtype=np.int64)
    one_row = Curve(np.array([32.0, 4032.0]), np.array([1e-5, 2e-5]))
    curves = compose.prefill_curves(
        AttentionProfile(none, none, chunk, context, seconds), one_row, np.array([64, 128, 256])
    )
    extra, slope = (float(np.interp(192, c.nodes, c.seconds)) for c in (curves.extra, curves.context))
    predicted = 1e-5 + extra + 500 * slope
    assert predicted == pytest.approx(2e-5 + 1e-8 * 192 + 1e-10 * 192 * 500, rel=1e-3)


def test_a_gemm_between_measured_shapes_scales_with_its_flops() -> None:
    m = np.array([1, 128])
    table = {(n, k): (m, np.array([1.0, 2.0]) * n * k * 1e-9) for n in (1024, 2048) for k in (1024, 4096)}
    assert compose.gemm_time(table, m, 1500, 3000) == pytest.approx(np.array([1.0, 2.0]) * 1500 * 3000 * 1e-9)


def test_a_small_drafter_is_bound_by_launches_and_a_crowd_by_compute() -> None:
    sampler = Curve(np.array([1.0, 512.0]), np.array([2e-5, 2e-5]))
    estimates = Estimates()
    requests = np.array([1, 512])
    times = compose.drafter_times(model_shape("llama_160m"), gpu_spec("a100_80gb"), sampler, requests, estimates)
    assert times.step.seconds[0] == pytest.approx(estimates.draft_launch_s)
    assert times.step.seconds[1] > times.step.seconds[0]
    assert times.kv_token_s == pytest.approx(2 * 2 * 12 * 768 / (2.039e12 * 0.75))


def test_held_out_rows_leave_the_tile_boundaries_fitted() -> None:
    tokens = np.array([1, 2, 4, *range(8, 1025, 8), *range(1040, 2049, 16), *range(2080, 4097, 32)])
    held = holdout.heldout_tokens(tokens)
    assert not held[np.isin(tokens, [1, 64, 128, 256, 512, 1024, 2048, 4096])].any()
    assert held[tokens == 136].all()
    assert 0.45 < held.mean() < 0.55


def test_the_shipped_tables_are_what_the_profiles_build(profile_dir: Path) -> None:
    for name in build.ENGINES:
        built = build.dump(build.table_document(profile_dir, name))
        assert built == (TABLES_FOLDER / f"{name}.json").read_text(), f"rebuild {name} with engine.latency.build"


def test_unfitted_measurements_are_predicted_within_five_percent(profile_dir: Path) -> None:
    scores = validate.run_checks(profile_dir)
    missed = [score for score in scores if not score.passed]
    assert not missed, missed
    sections = {score.section for score in scores if score.target is not None}
    assert any("mixed" in section for section in sections)
    assert any("decode attention" in section for section in sections)
