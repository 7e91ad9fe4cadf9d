"""TRL's online trainers with vLLM generation: merged weights are pushed into the engine with its names.

Requires TRL and vLLM; the package does not import this module. TRL's own weight synchronization merges in the storage
of the experts and sends codes, which no engine accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer, RLOOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from ..merge import LiveWeights


def load_into_vllm(llm: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replaces the weights of a running engine.

    Args:
        llm: a `vllm.LLM` in this process, with `distributed_executor_backend="external_launcher"`, as started by TRL,
            or `VLLM_ENABLE_V1_MULTIPROCESSING=0`.
        weights: key in the checkpoint -> tensor, such as `LiveWeights`, with all parts of layers that the engine
            fuses.

    Raises:
        ValueError: the engine is in another process.
    """
    executor = getattr(llm.llm_engine, "model_executor", None)
    if executor is None:
        raise ValueError(
            "The engine runs in another process, which cannot share weights with this one. Start it with "
            "distributed_executor_backend='external_launcher', or with VLLM_ENABLE_V1_MULTIPROCESSING=0."
        )
    with _kernels_made_anew(executor.driver_worker.model_runner.get_model()):
        # unlike the model's `load_weights`, this repeats the engine's conversion of weights for its kernels
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    llm.reset_prefix_cache()


@contextmanager
def _kernels_made_anew(model: nn.Module) -> Iterator[None]:
    """Removes the kernels of experts on a CPU: vLLM 0.32 packs experts only when it creates their kernel."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    on_cpu = next(model.parameters()).device.type == "cpu"
    kernels = {method: method.moe_kernel for method in methods if on_cpu and getattr(method, "moe_kernel", None)}
    for method in kernels:
        method.moe_kernel = None
    try:
        yield
    finally:
        for method, kernel in kernels.items():
            if method.moe_kernel is None:  # not loaded, restore
                method.moe_kernel = kernel


class LiveVllmGeneration(VLLMGeneration):
    """Generates with vLLM, in this process or on a server, and pushes `LiveWeights` into it.

    The first push sends all weights, since the engine has loaded the unquantized base; later ones send only weights
    that the adapters change. An engine in sleep mode loses its weights and gets all weights each time.

    Args:
        llm: the engine, if TRL's arguments cannot create it. Default: TRL starts the engine.
        kwargs: arguments of `VLLMGeneration`.
    """

    def __init__(self, *, llm: Any = None, **kwargs: Any) -> None:
        self._given = llm
        self._live: dict[bool, LiveWeights] = {}
        self._metadata: dict[bool, list] = {}
        self._only_adapted = False
        super().__init__(**kwargs)

    def _init_vllm(self) -> None:
        if self._given is not None:
            self.llm, self._llm_weights_sleeping = self._given, False
            return
        model = self.model
        # TRL looks for bitsandbytes layers in the model, and would make vLLM quantize in the same way
        self.model = _Named(model.name_or_path)
        try:
            super()._init_vllm()
        finally:
            self.model = model

    def sync_weights(self) -> None:
        if self.mode != "colocate":
            self._weight_metadata = self._metadata.get(self._only_adapted)
            super().sync_weights()
            self._metadata[self._only_adapted] = self._weight_metadata
        else:
            if self.enable_sleep_mode:
                torch.cuda.empty_cache()
                self.llm.wake_up(tags=["weights"])
                self._llm_weights_sleeping = False
            load_into_vllm(self.llm, self._iter_named_params())
        self._only_adapted = not self.enable_sleep_mode

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._only_adapted not in self._live:
            self._live[self._only_adapted] = LiveWeights(self.model, only_adapted=self._only_adapted)
        return iter(self._live[self._only_adapted])


class _Named(nn.Module):
    """Placeholder for the model while the engine starts."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name_or_path = name


class _WithLiveVllm:
    """Mixin for TRL's trainers, which create their `VLLMGeneration` in the constructor."""

    logprobs: int | None = 0

    def __init__(self, *positional: Any, llm: Any = None, **kwargs: Any) -> None:
        args = kwargs.get("args")
        if args is None or not args.use_vllm:
            raise ValueError(f"{type(self).__name__} requires vLLM generation. Pass args=...Config(use_vllm=True).")
        if getattr(args, "loss_type", None) == "vespo":
            raise ValueError("loss_type='vespo' is not tested with live weights. Choose another loss.")
        # otherwise TRL would start the engine with its own synchronization
        args.use_vllm = False
        try:
            super().__init__(*positional, **kwargs)
        finally:
            args.use_vllm = True
        self.use_vllm = True
        self._last_loaded_step = -1
        self.vllm_generation = LiveVllmGeneration(
            llm=llm,
            model=self.model,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            mode=args.vllm_mode,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            group_port=args.vllm_group_port,
            server_timeout=args.vllm_server_timeout,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_completion_length=self.max_completion_length,
            logprobs=self.logprobs,
            generation_kwargs=args.generation_kwargs,
        )


class LiveVllmGRPOTrainer(_WithLiveVllm, GRPOTrainer):
    """`GRPOTrainer` for a model of this package with `use_vllm=True`; pass `args` by keyword, `llm` as above."""


class LiveVllmRLOOTrainer(_WithLiveVllm, RLOOTrainer):
    """`RLOOTrainer` for a model of this package with `use_vllm=True`; pass `args` by keyword, `llm` as above."""

    logprobs = None
