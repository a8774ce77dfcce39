"""A model as an engine is set to lay it out: which rank holds what, and what moves in between."""

from pathlib import Path

import torch

from isomoe.blocks import SparseMoe
from isomoe.comm.deepep import DeepEpMode, DeepEpSettings, check_available
from isomoe.config import EngineConfig, MoeWeightFormat, choice
from isomoe.engine.model_info import ModelInfo
from isomoe.errors import ConfigError
from isomoe.layout import (
    MACHINES,
    A2ABackend,
    Chain,
    ExpertLocation,
    Plan,
    TokenRows,
    make_plan,
    read_pinned,
)
from isomoe.models import CausalLM, build, check_expert_flags, family_of


def laid_out(config: EngineConfig, info: ModelInfo, rank: int = 0) -> CausalLM:
    """The model on one rank, without weights.

    Raises:
        ConfigError: if it cannot be laid out so, or has none of the experts that settings are
            about; if the file of the experts' location does not fit; if DeepEP is asked for and is
            not there, or cannot do it.
    """
    layout = config.parallelism
    check_expert_flags(info.hf_config, config.expert_flags)
    if layout.moe_a2a_backend is A2ABackend.DEEPEP:
        check_available(info.device, layout.tp_size)
    location = None
    if config.init_expert_location is not None:
        file = Path(config.init_expert_location)
        location = ExpertLocation.load(file, layout.ep_num_redundant_experts, layout.ep_size)
        layers = family_of(info.hf_config).num_layers(info.hf_config)
        if location.num_layers > layers:  # of another model; too few are met layer by layer
            raise ConfigError(
                f"--init-expert-location {file}: has {location.num_layers} rows; the model has "
                f"{layers} decoder layers, and needs as many"
            )
    model = build(info.hf_config, layout, rank, location=location)
    if info.expert_block is not None:
        reason = model.keep_experts_in_fp8(info.expert_block)
        if reason and config.moe_weight_format is MoeWeightFormat.FP8:
            raise ConfigError(f"--moe-weight-format fp8: {reason}; --moe-weight-format none works")
    deepep = deepep_settings(config, info, model)
    if deepep is not None:
        total = config.max_running_requests + config.prefill_limits(info.device)[1]
        rows = TokenRows.of(model.seat.mesh, (total,) * layout.attn_dp_size)
        deepep.check_step(max(rows.counts(model.seat, model.seat.mesh.moe_ep)))
    return model


def deepep_settings(
    config: EngineConfig, info: ModelInfo, model: CausalLM
) -> DeepEpSettings | None:
    """What DeepEP is asked to do; None if it is not asked.

    Raises:
        ConfigError: if it cannot do it.
    """
    layout = config.parallelism
    if layout.moe_a2a_backend is not A2ABackend.DEEPEP:
        return None
    routed = [block for block in model.blocks() if isinstance(block, SparseMoe)]
    return DeepEpSettings(
        hidden_size=model.config["hidden_size"],
        top_k=max(block.routing.top_k for block in routed),
        form=layout.moe_wire_format,
        dtype=getattr(torch, info.dtype),
        scales_input=any(block.experts.form.scales_input for block in routed),
        mode=choice(DeepEpMode, config.deepep_mode, "--deepep-mode"),
    )


def planned(config: EngineConfig, info: ModelInfo, chain: Chain) -> Plan:
    """The cheapest plan on the device's machine; or the one that is pinned, once it is checked.

    Raises:
        ConfigError: if the pinned plan cannot be read.
        PlacementError: if no plan can be, or the pinned one is not right for this chain.
    """
    machine = MACHINES[info.device]
    if config.plan is not None:
        return read_pinned(Path(config.plan), chain, machine)
    return make_plan(chain, machine)
