"""AdamW under DeepSpeed's ZeRO: gradients are summed over ranks, states and parameters sharded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dllm_rl.config.cluster import LearnerSection
from dllm_rl.errors import UserError
from dllm_rl.learner.optimizer import Optimizer, adamw


def join_ranks(rank: int, size: int, store: torch.distributed.Store) -> None:
    """Set up DeepSpeed's process group in this process.

    Args:
        rank: of this process.
        size: number of ranks.
        store: where the ranks meet. DeepSpeed's own would listen on every interface, and let anybody in.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    local = torch.cuda.current_device() if cuda else 0
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local)}  # DeepSpeed reads them
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel("ERROR")
    # On a CPU it would compile a shared-memory collective with g++ at start-up, for a minute; gloo does as well here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if cuda else "gloo"
    if not torch.distributed.is_initialized():
        timeout = timedelta(minutes=30)  # DeepSpeed's; a rank that is lost is noticed by the driver long before
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        deepspeed.init_distributed(backend, verbose=False)


def check_options(config: LearnerSection) -> None:
    """Refuse options that DeepSpeed does not know, before anything starts.

    Raises:
        UserError: naming the first.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**settings(config, torch.float32)["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"learner.zero_options: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}; DeepSpeed's "
            f"documentation lists the keys of zero_optimization"
        ) from error


class Root(nn.Module):
    """The root that DeepSpeed wraps: a function of the denoiser is one forward, so that sharded weights are there."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.network: nn.Module = denoiser.module
        self._denoiser = [denoiser]  # not a module

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Apply the function to the denoiser."""
        return function(self._denoiser[0], *arguments)


class ZeroOptimizer(Optimizer):
    """Optimizer's interface over a DeepSpeed engine.

    Attributes:
        engine: runs forwards too.
    """

    def __init__(self, root: nn.Module, parameters: Sequence[nn.Parameter], config: LearnerSection, steps: int) -> None:
        """Shard the parameters' states (stage 1), gradients (2) and the parameters themselves (3).

        Args:
            root: its forward runs under the engine.
            parameters: what is trained.
            config: optimiser settings, zero_stage and offloading.
            steps: length of the run, for the schedule.
        """
        import deepspeed

        self._config, self._total_steps, self._parameters = config, steps, list(parameters)
        self._adam = adamw(parameters, [p.dim() >= 2 for p in parameters], config)
        self._stage = zero_stage(config, parameters[0].dtype)
        self._size = torch.distributed.get_world_size()
        self.engine: Any = deepspeed.initialize(
            model=root,
            optimizer=self._adam,
            model_parameters=[p for p in parameters],
            config=settings(config, parameters[0].dtype),
        )[0]

    def start(self, step: int) -> float:
        """Set and return the learning rate of a step."""
        lr = super().start(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def zero_grad(self) -> None:
        """The engine forgets gradients after each step."""

    def backward(self, value: Tensor, *, last: bool) -> None:
        """Add the gradient of a scalar; the last one of a step exchanges gradients with the other ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(value * self._size, scale_wrt_gas=False)  # it averages over ranks, our losses are shares

    def separate_steps(self) -> None:
        """Give each parameter a count of steps of its own.

        ZeRO 3 loads its universal layout with one tensor for all groups (matrices, vectors), which each would count up.
        """
        for state in self._adam.state.values():
            state["step"] = state["step"].clone()

    def step(self, check: Callable[[Tensor], None]) -> Tensor:
        """Clip and change the parameters; ZeRO leaves them as they were if the norm is not finite."""
        if self._stage == 0:  # the engine does not tell the norm, and would step with whatever it is
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            check(norm)
            self.engine.step()
            return norm
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm())
        if getattr(self.engine.optimizer, "overflow", False):
            norm = torch.tensor(float("nan"))
        check(norm)
        return norm


def zero_stage(config: LearnerSection, dtype: torch.dtype) -> int:
    """The stage that runs: bfloat16 without ZeRO would have neither master weights nor float32 sums of gradients."""
    return max(1, config.zero_stage) if dtype == torch.bfloat16 else config.zero_stage


def settings(config: LearnerSection, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {**config.zero_options, "stage": zero_stage(config, dtype)}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # it is not used: micro-batches are ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, equal to the other learner's; no compiler needed
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},  # 512 sums in bfloat16 lose 2%, 4,096 half of the gradient
        "steps_per_print": 1 << 62,
    }
