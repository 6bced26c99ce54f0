import torch

class CPUDNNLGEMMHandler:
    handler_tensor: torch.Tensor

def create_onednn_scaled_mm(
    weight: torch.Tensor, weight_scales: torch.Tensor, output_type: torch.dtype, dynamic_quant: bool, use_azp: bool
) -> CPUDNNLGEMMHandler: ...
def cutlass_scaled_mm_azp(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    azp_adj: torch.Tensor,
    azp: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor: ...
def onednn_scaled_mm(
    dnnl_handler: CPUDNNLGEMMHandler,
    x: torch.Tensor,
    output: torch.Tensor,
    input_scale: torch.Tensor | None,
    input_zp: torch.Tensor | None,
    input_zp_adj: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor: ...
