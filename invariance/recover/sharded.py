"""Weights shared out among the processes that train them: `strategy: fsdp`, which is PyTorch's fully_shard, on any device."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..model.layout import Layout

NAME = "fsdp"


def strategy(trainer: dict[str, Any], where: str) -> ModelParallelStrategy:
    """Lightning's strategy for weights in parts: every process a part of each, and windows of its own; checkpoints whole.

    Raises InputError where the recipe does not say how many processes there are.
    """
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes", 1)
    if type(devices) is not int or devices < 2:
        raise InputError(
            f"{where}: recover.trainer: `strategy: {NAME}` gives each of several processes a part of the weights. Say how "
            "many there are, as in `devices: 2`, or remove the strategy."
        )
    return ModelParallelStrategy(devices * nodes, 1, save_distributed_checkpoint=False)


def shard(model: PreTrainedModel, layout: Layout, mesh: DeviceMesh) -> None:
    """Leave this process its part of each weight; a block's are whole while the block computes, all others throughout.

    A model that is shared out already is left as it is.
    """
    if isinstance(model, FSDPModule):
        return
    blocks = model.get_submodule(layout.architecture.blocks)
    for module in (*blocks.children(), model):
        fully_shard(module, mesh=mesh["data_parallel"])
