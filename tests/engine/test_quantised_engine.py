"""Quantised checkpoints through the engine: the answers of the same weights, dequantised."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isomoe.config import EngineConfig, LoadFormat, MoeWeightFormat
from isomoe.engine import LLM, SamplingParams
from isomoe.engine.model_info import ModelInfo, expert_block
from isomoe.errors import ConfigError
from isomoe.weights.quantization import Fp8, Mxfp4
from quantised import MXFP4, change_config, fp8, quantise_fp8, save_mxfp4
from support import save_random, tiny_config

PROMPTS = [[5, 9, 21, 3, 77], [14], [100, 2, 2]]
BLOCK = (128, 128)  # as all published FP8 checkpoints have


@pytest.fixture(scope="module", params=["fp8", "mxfp4"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised checkpoint, and beside it `plain`: its values in fp32."""
    folder = tmp_path_factory.mktemp("kept") / "quantised"
    if request.param == "fp8":
        sizes = {"hidden_size": 192, "moe_intermediate_size": 160, "num_hidden_layers": 2}
        save_random(tiny_config("qwen3", **sizes, eos_token_id=None, bos_token_id=None), folder)
        change_config(folder, quantization_config=fp8(*BLOCK))
        meant = quantise_fp8(folder, BLOCK)
    else:
        folder.mkdir()
        meant = save_mxfp4(folder)
    plain = folder.parent / "plain"
    shutil.copytree(folder, plain)
    change_config(plain, quantization_config=None)
    save_file(meant, plain / "model.safetensors")
    return folder


def answers(folder: Path, **options: object) -> list[object]:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    with LLM(str(folder), device="cpu", max_total_tokens=256, **options) as engine:  # type: ignore[arg-type]
        found = engine.generate(PROMPTS, params)
    return [(output.token_ids, output.logprobs) for output in found]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_checkpoint_answers_as_its_values_do(quantised: Path, dtype: str) -> None:
    expected = answers(quantised.parent / "plain", dtype=dtype)
    assert len(expected) == len(PROMPTS)
    assert answers(quantised, dtype=dtype) == expected


@pytest.mark.parametrize("quantised", ["fp8"], indirect=True)  # others would be rounded
@pytest.mark.parametrize("wire", ["none", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_kept_in_fp8_answer_as_their_values_do(
    quantised: Path, dtype: str, wire: str
) -> None:
    """Rows that are packed, too: of plain experts they are unpacked first."""
    options = {"dtype": dtype, "moe_wire_format": wire}
    expected = answers(quantised.parent / "plain", **options)
    assert answers(quantised, **options, moe_weight_format="fp8") == expected


@pytest.mark.parametrize(
    ("asked", "quantization", "device", "capability", "block"),
    [
        ("auto", Fp8((128, 128)), "cuda", (9, 0), 128),
        ("auto", Fp8((128, 128)), "cuda", (8, 0), None),
        ("auto", Fp8((128, 64)), "cuda", (9, 0), None),
        ("auto", Fp8((128, 128)), "cpu", None, None),
        ("auto", None, "cuda", (9, 0), None),
        ("auto", Mxfp4(), "cuda", (9, 0), None),
        ("none", Fp8((128, 128)), "cuda", (9, 0), None),
        ("fp8", Fp8((64, 64)), "cuda", (8, 9), 64),
        ("fp8", Fp8((64, 64)), "cpu", None, 64),
        ("fp8", None, "cuda", (9, 0), 128),
        ("fp8", Mxfp4(), "cpu", None, 128),
    ],
)
def test_in_which_blocks_experts_are_kept(
    asked: str,
    quantization: Fp8 | Mxfp4 | None,
    device: str,
    capability: tuple[int, int] | None,
    block: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert expert_block(MoeWeightFormat(asked), quantization, device) == block


@pytest.mark.parametrize(
    ("capability", "quantization", "message"),
    [
        ((8, 0), None, "capability 8.9; --moe-weight-format none works"),
        ((9, 0), Fp8((128, 64)), "blocks of 128 x 64, and square ones can be kept"),
    ],
)
def test_what_cannot_be_kept_in_fp8_is_refused(
    capability: tuple[int, int],
    quantization: Fp8 | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ConfigError, match=message):
        expert_block(MoeWeightFormat.FP8, quantization, "cuda")


def test_shares_too_small_for_fp8_are_refused_before_any_worker_starts(folder: Path) -> None:
    # 24 columns of an expert on two ranks: 12 each.
    with pytest.raises(ConfigError, match=r"runs of 4, .*; --moe-weight-format none works"):
        LLM(str(folder), device="cpu", moe_weight_format="fp8", tp_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["none", "fp8"])
def test_ranks_with_experts_in_fp8_answer_alike(quantised: Path, wire: str) -> None:
    options = {"dtype": "float32", "moe_weight_format": "fp8", "moe_wire_format": wire}
    expected = answers(quantised, **options)
    for layout in ({"tp_size": 2}, {"tp_size": 4, "attn_dp_size": 2, "ep_size": 2}):
        for (ids, scored), (other, theirs) in zip(
            answers(quantised, **options, **layout), expected, strict=True
        ):
            assert ids == other
            assert [one.logprob for one in scored] == [
                pytest.approx(one.logprob, abs=1e-4) for one in theirs
            ]


@pytest.mark.slow
def test_ranks_read_their_shares_of_a_quantised_checkpoint(quantised: Path) -> None:
    sizes = {"dtype": "float32", "tp_size": 4, "attn_dp_size": 2, "ep_size": 2}
    assert answers(quantised, **sizes) == answers(quantised.parent / "plain", **sizes)


@pytest.mark.parametrize("load_format", LoadFormat)
def test_how_weights_are_kept_is_read_or_refused_before_any_worker_starts(
    folder: Path, load_format: LoadFormat, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = EngineConfig(model_path=str(copy), load_format=load_format)
    assert ModelInfo.of(config).quantization is None
    for options, meant in ((fp8(*BLOCK), Fp8(BLOCK)), (MXFP4, Mxfp4())):
        change_config(copy, quantization_config=options)
        assert ModelInfo.of(config).quantization == meant
    change_config(copy, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match=r"quantization_config\.quant_method 'gptq'"):
        ModelInfo.of(config)


def test_a_config_without_a_dtype_is_run_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert ModelInfo.of(EngineConfig(model_path=str(folder))).dtype == "float32"
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = ModelInfo.of(EngineConfig(model_path=str(tmp_path), load_format=LoadFormat.DUMMY))
    assert found.dtype == "bfloat16"
