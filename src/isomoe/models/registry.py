"""From a config.json to a model class, and the layouts that fit it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from isomoe.errors import ConfigError, IsomoeError, PlacementError
from isomoe.layout import ExpertLocation, Parallelism, Seat
from isomoe.layout.parallelism import MAX_RANKS, divisors
from isomoe.models.bailing_moe import BailingMoe, BailingMoeV2
from isomoe.models.bailing_moe_linear import BailingMoeLinearV2, BailingMoeV25
from isomoe.models.causal_lm import CausalLM, HFConfig
from isomoe.models.deepseek_v2 import DeepseekV2, DeepseekV3
from isomoe.models.exaone_moe import ExaoneMoe
from isomoe.models.glm4_moe import Glm4Moe
from isomoe.models.gpt_oss import GptOss
from isomoe.models.hunyuan_v3 import HunyuanV3
from isomoe.models.llada2 import Llada2
from isomoe.models.llama4 import Llama4
from isomoe.models.mimo_v2_flash import MiMoV2Flash
from isomoe.models.minimax_m2 import MiniMaxM2
from isomoe.models.mixtral import Mixtral
from isomoe.models.qwen2_moe import Qwen2Moe
from isomoe.models.qwen3_moe import Qwen3Moe
from isomoe.models.sarvam_moe import SarvamMla, SarvamMoe
from isomoe.models.sdar_moe import SdarMoe
from isomoe.models.step3p5 import Step3p5

FAMILIES: tuple[type[CausalLM], ...] = (
    Qwen2Moe,
    Qwen3Moe,
    DeepseekV2,
    DeepseekV3,
    Glm4Moe,
    ExaoneMoe,
    HunyuanV3,
    MiMoV2Flash,
    MiniMaxM2,
    Llama4,
    Step3p5,
    BailingMoe,
    BailingMoeV2,
    BailingMoeLinearV2,
    BailingMoeV25,
    SarvamMoe,
    SarvamMla,
    SdarMoe,
    Llada2,
    Mixtral,
    GptOss,
)


def read_config(path: Path) -> HFConfig:
    """A config.json, given itself or its folder.

    Raises:
        ConfigError: if it is missing or no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not a JSON object")
    text = config.get("text_config")
    if isinstance(text, dict):  # a multimodal checkpoint, of which the text model is run
        return {**config, **text, "architectures": config.get("architectures")}
    return config


def family_of(config: HFConfig) -> type[CausalLM]:
    """The class that runs a checkpoint.

    Raises:
        ConfigError: if its architecture is unknown; lists the known ones.
    """
    named = config.get("architectures")
    listed = named if isinstance(named, list) else [named]
    names = [name for name in listed if isinstance(name, str)]
    names = names or [f"(none; model_type {config.get('model_type')!r})"]
    for family in FAMILIES:
        if set(family.architectures) & set(names):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConfigError(f"architecture {', '.join(names)} is not supported; known: {known}")


def build(
    config: HFConfig,
    parallelism: Parallelism,
    rank: int = 0,
    layers: list[int] | None = None,
    location: ExpertLocation | None = None,
) -> CausalLM:
    """The model on one rank's seat, without weights.

    Args:
        layers: which of its layers; all by default.
        location: which rank holds which expert; None: in order.

    Raises:
        ConfigError: if the config makes no model, or the layout does not fit; names the nearest
            sizes that do.
    """
    family = family_of(config)
    check_expert_flags(config, parallelism.expert_flags)
    with _explained():
        if parallelism.moe_dense_tp_size is not None and not family.has_dense(config):
            raise ConfigError(
                f"--moe-dense-tp-size {parallelism.moe_dense_tp_size}: the model has no dense FFN; "
                "without the flag it works"
            )
        try:
            mesh = family.mesh(config, parallelism)
            return family(config, Seat(mesh, rank), layers, location)
        except ConfigError as error:
            raise ConfigError(f"{error}{_advice(family, config, parallelism)}") from None


def check_expert_flags(config: HFConfig, flags: Sequence[str]) -> None:
    """Whether `flags`, which are about routed experts, are about anything in the model.

    Raises:
        ConfigError: if it has no routed experts.
    """
    with _explained():
        if flags and not family_of(config).has_sparse(config):
            raise ConfigError(
                f"{', '.join(flags)}: the model has no routed experts; it works without"
            )


def fits(family: type[CausalLM], config: HFConfig, parallelism: Parallelism) -> bool:
    """Whether the model can be laid out so.

    Raises:
        ConfigError: if the config makes no model under any layout, where that shows.
    """
    with _explained():
        sorts = family.sorts(config)
        one_of_each = sorted({sort: index for index, sort in enumerate(sorts)}.values())
        try:
            check_expert_flags(config, parallelism.expert_flags)
            family(config, Seat(family.mesh(config, parallelism), 0), one_of_each)
        except (ConfigError, PlacementError):
            return False
    return True


def representative(family: type[CausalLM], config: HFConfig) -> list[int]:
    """The fewest layers that hold each sort of layer after each other sort that precedes it.

    One layer of each sort in each surrounding: a plan that is the same between the same sorts of
    layer is then proven for all of them.

    Raises:
        ConfigError: if the config does not say of which sort a layer is.
    """
    with _explained():
        sorts = family.sorts(config)
    seen: set[Any] = set()
    chosen: list[int] = []
    for index, sort in enumerate(sorts):
        step = (sorts[index - 1] if index else "first", sort)
        if step not in seen:
            seen.add(step)
            if index and chosen[-1:] != [index - 1]:
                chosen.append(index - 1)
            chosen.append(index)
    return chosen


def layouts(
    family: type[CausalLM],
    config: HFConfig,
    max_ranks: int,
    min_ranks: int = 1,
    attn_dp_size: int | None = None,
) -> Iterator[Parallelism]:
    """Every layout of up to `max_ranks` ranks that fits the model.

    Args:
        attn_dp_size: only those of so many attention-DP groups.

    Raises:
        ConfigError: if the config makes no model, where that shows.
    """
    with _explained():
        dense = family.has_dense(config)
    for tp in range(min_ranks, max_ranks + 1):
        for dp in divisors(tp) if attn_dp_size is None else [attn_dp_size]:
            for ep in divisors(tp):
                layout = Parallelism(tp_size=tp, attn_dp_size=dp, ep_size=ep)
                if dense:  # whose narrowest shards fit whatever the model
                    layout = replace(layout, moe_dense_tp_size=1)
                if not fits(family, config, layout):
                    continue
                for dense_tp in [*divisors(tp)[:-1], None] if dense else [None]:
                    layout = replace(layout, moe_dense_tp_size=dense_tp)
                    if dense_tp != 1 and dense and not fits(family, config, layout):
                        continue
                    yield layout
                    if dp > 1:  # the vocabulary is padded to any number of ranks
                        yield replace(layout, enable_dp_lm_head=True)


@contextmanager
def _explained() -> Iterator[None]:
    """Turns into a ConfigError what a config raises whose values have another type or length, or
    are out of range: too many to check them one by one."""
    try:
        yield
    except IsomoeError:
        raise
    except KeyError as error:
        raise ConfigError(f"config.json: {error.args[0]!r} is missing") from None
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config.json: it makes no model ({type(error).__name__}: {error})"
        ) from error


def _advice(family: type[CausalLM], config: HFConfig, wrong: Parallelism) -> str:
    """The nearest sizes that would work, changing one flag of `wrong` at a time."""
    offers = []
    for flag, field, sizes in (
        ("--tp-size", "tp_size", range(1, min(MAX_RANKS, 4 * wrong.tp_size) + 1)),
        ("--attn-dp-size", "attn_dp_size", divisors(wrong.tp_size)),
        ("--ep-size", "ep_size", divisors(wrong.tp_size)),
    ):
        near = []
        asked = getattr(wrong, field)
        for size in sorted(sizes, key=lambda size: (abs(size - asked), size)):
            try:
                layout = wrong.with_sizes(**{field: size})
            except ConfigError:
                continue
            if size != asked and fits(family, config, layout):
                near.append(size)
            if len(near) == 2:
                break
        if near:
            offers.append(f"{flag} {' or '.join(map(str, sorted(near)))}")
    return f"; what would work: {', '.join(offers)}" if offers else ""
