"""What makers publish of their devices, for figures on paper: nothing here was measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Of a device.

    Attributes:
        name: for people.
        reported_as: what torch calls it, and result files with it.
        bytes_per_second: of its memory.
        flops_per_second: in products of dense bfloat16 or float16 matrices with float32 sums.
    """

    name: str
    reported_as: str
    bytes_per_second: float
    flops_per_second: float


# figures with sparsity, which data sheets name first, are twice these
PEAKS = {
    # NVIDIA H100 Tensor Core GPU data sheet, column H100 SXM
    "h100": Peaks("H100 SXM", "NVIDIA H100 80GB HBM3", 3.35e12, 989e12),
    # NVIDIA H200 Tensor Core GPU data sheet, column H200 SXM
    "h200": Peaks("H200 SXM", "NVIDIA H200", 4.8e12, 989e12),
    # NVIDIA A100 Tensor Core GPU data sheet, column A100 80GB SXM
    "a100": Peaks("A100 80GB SXM", "NVIDIA A100-SXM4-80GB", 2.039e12, 312e12),
    # NVIDIA L40S data sheet
    "l40s": Peaks("L40S", "NVIDIA L40S", 864e9, 362e12),
    # NVIDIA Ada GPU Architecture white paper, appendix A
    "rtx4090": Peaks("RTX 4090", "NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12),
}


def peaks_of(names: str) -> list[Peaks]:
    """The devices of `h100,l40s`, each once, in this order.

    Raises:
        ValueError: for one that is not known, naming those that are.
    """
    wanted = list(dict.fromkeys(name.strip().lower() for name in names.split(",")))
    unknown = [name for name in wanted if name not in PEAKS]
    if unknown:
        raise ValueError(f"predict: expected some of {', '.join(PEAKS)}, found {', '.join(map(repr, unknown))}")
    return [PEAKS[name] for name in wanted]
