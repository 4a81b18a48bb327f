"""What vendors say of their chips: rates, memory, links. One entry per JAX device, by its exact `device_kind`."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      name: for tables.
      flops_per_sec: dense bfloat16 products.
      memory_bytes: of the device.
      memory_bytes_per_sec: from and to that memory.
      near_bytes_per_sec: that the device can send to those it is closely linked with, all links in one direction.
      near_devices: that are closely linked: in a host with NVLink, or in a TPU slice.
      far_bytes_per_sec: that it can send to all others, over its part of the host's network.
      has_fused_attention: whether `attention_impl="auto"` keeps no attention weights for the backward pass.
      source: of these numbers.
    """

    name: str
    flops_per_sec: float
    memory_bytes: int
    memory_bytes_per_sec: float
    near_bytes_per_sec: float
    near_devices: int
    far_bytes_per_sec: float
    has_fused_attention: bool
    source: str


# FLOP/s of one JAX device for dense bfloat16 matrix products, with float32 accumulation, by `device_kind`.
BFLOAT16_FLOPS_PER_SEC: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

# NVLink and ICI are quoted with both directions added up; here is one.
CHIPS: dict[str, Chip] = {
    "NVIDIA H200": Chip(
        name="H200",
        flops_per_sec=BFLOAT16_FLOPS_PER_SEC["NVIDIA H200"],
        memory_bytes=141 * 10**9,
        memory_bytes_per_sec=4.8e12,
        near_bytes_per_sec=450e9,
        near_devices=8,
        far_bytes_per_sec=50e9,
        has_fused_attention=True,
        source="NVIDIA H200 data sheet (half of the rate with sparsity, NVLink 900 GB/s); DGX H200: one 400 Gb/s "
        "network port per GPU",
    ),
    "TPU v5 lite": Chip(
        name="v5e",
        flops_per_sec=BFLOAT16_FLOPS_PER_SEC["TPU v5 lite"],
        memory_bytes=16 * GIB,
        memory_bytes_per_sec=819e9,
        near_bytes_per_sec=200e9,
        near_devices=256,
        far_bytes_per_sec=25e9 / 8,
        has_fused_attention=False,
        source="cloud.google.com/tpu/docs/v5e: ICI 400 GB/s in both directions, 2-D torus of 16 x 16 chips, "
        "6.4 Tb/s of data-centre network per 256 chips",
    ),
    "TPU v5": Chip(
        name="v5p",
        flops_per_sec=BFLOAT16_FLOPS_PER_SEC["TPU v5"],
        memory_bytes=95 * GIB,
        memory_bytes_per_sec=2765e9,
        near_bytes_per_sec=600e9,
        near_devices=6144,
        far_bytes_per_sec=50e9 / 8,
        has_fused_attention=False,
        source="cloud.google.com/tpu/docs/v5p: ICI 1200 GB/s in both directions, 3-D torus, slices up to 6144 chips, "
        "50 Gb/s of data-centre network per chip",
    ),
}
