"""Models as files for other runtimes: ONNX, OpenVINO, AOTInductor, TorchScript, and torch's own exported programs."""

from dinat_triton.export.formats import FORMATS, format_of
from dinat_triton.export.writing import Written, export

__all__ = ["FORMATS", "Written", "export", "format_of"]
