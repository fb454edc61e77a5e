"""What DeepSpeed is told of a run, and which values there are."""

from __future__ import annotations

from typing import Any

DTYPES = ("fp32", "bf16")
_BUCKET_ELEMENTS = 200_000_000


def check(stage: int, micro_batch: int, accumulation: int, dtypes: tuple[str, str, str]) -> None:
    """Raise ValueError for a stage, size or dtype that does not exist. dtypes: as `options` has them."""
    if stage not in (1, 2, 3):
        raise ValueError(f"ZeRO stage must be 1, 2 or 3, got {stage}; on one rank stage 1 is plain training")
    if any(d not in DTYPES for d in dtypes) or (dtypes[0] == "fp32" and dtypes != ("fp32",) * 3):
        raise ValueError(
            f"(dtype, communication_dtype, accumulation_dtype) = {dtypes}: each is one of {list(DTYPES)}, "
            "and an fp32 run has all three in fp32"
        )
    if micro_batch < 1 or accumulation < 1:
        raise ValueError(f"micro_batch and accumulation must be at least 1, got {micro_batch} and {accumulation}")


def options(
    stage: int, micro_batch: int, accumulation: int, world: int, dtypes: tuple[str, str, str], numel: int
) -> dict[str, Any]:
    """DeepSpeed's configuration. dtypes: of weights, in communication, in accumulation. numel: of what is trained."""
    dtype, communication_dtype, accumulation_dtype = dtypes
    # DeepSpeed allocates a whole bucket in every backward pass, however small the model.
    bucket = max(1024, min(numel, _BUCKET_ELEMENTS))
    return {
        "train_batch_size": micro_batch * accumulation * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            # Stage 3 would replace torch's linear in the whole process by one that adds its bias in place, which spoils
            # the products that recomputation keeps.
            "memory_efficient_linear": False,
            # Gradients are copied into one buffer in order to be communicated; one rank has nothing to communicate.
            "contiguous_gradients": world > 1,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2 * bucket,
        },
        # The optimizer skips by the norm, on the device; DeepSpeed's own check would read it back to the host.
        "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": False},
        "communication_data_type": communication_dtype,
        "data_types": {"grad_accum_dtype": accumulation_dtype},
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }


def merged(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """config with overrides laid over it, tables merged."""
    both = dict(config)
    for key, value in overrides.items():
        both[key] = merged(config[key], value) if isinstance(config.get(key), dict) else value
    return both
