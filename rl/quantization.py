"""How a checkpoint declares its quantisation. Left out: dequantising (`rl.deferred`) and serving (`rollout`)."""

from __future__ import annotations

from typing import Any

MXFP4 = "mxfp4"


def quantization_method(config: Any) -> str | None:
    """The quantisation method in a checkpoint's transformers configuration, for example "mxfp4"; None: not
    quantised."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))
