"""The formats: how each writes a program with its metadata, and loads and runs what it wrote.

Metadata are strings by name. A loaded file takes and returns float32 tensors.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Metadata = dict[str, str]
Runnable = Callable[[Tensor], Tensor]
IN_FILE = "metadata.json"


class Format:
    """A format.

    Attributes:
        name: As it is asked for.
        ending: Of its files' names.
        packages: What writing and running needs besides torch; the extra `export` brings them.
        dtypes: What it can compute in.
    """

    name: str
    ending: str
    packages: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def check_installed(self) -> None:
        """Refuses a format whose packages are missing."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise RuntimeError(
                f"format {self.name!r} needs {' and '.join(missing)}: pip install 'dinat-triton[export]' brings it"
            )

    def files(self, path: Path) -> list[Path]:
        """All files of a model, the one it is asked for by first."""
        return [path]

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuses what it cannot compute in."""
        if dtype not in self.dtypes:
            raise ValueError(f"dtype for format {self.name!r} must be one of {self.dtypes}, got {dtype}")

    def write(self, program: ExportedProgram, files: list[Path], metadata: Metadata) -> None:
        """Writes the files."""
        raise NotImplementedError

    def quantize(self, files: list[Path]) -> None:
        """Rounds the weights of files to int8; each batch's activations are rounded as they come."""
        raise NotImplementedError

    def load(self, files: list[Path], threads: int | None = None) -> Runnable:
        """Loads the files into their runtime, on so many threads: as many as torch by default."""
        raise NotImplementedError

    def metadata(self, path: Path) -> Metadata:
        """Metadata that was written with a model."""
        raise NotImplementedError


class Onnx(Format):
    """ONNX, run by ONNX Runtime."""

    name, ending, packages = "onnx", ".onnx", ("onnx", "onnxscript", "onnxruntime")
    dtypes = (*FLOATS, torch.int8)

    def write(self, program: ExportedProgram, files: list[Path], metadata: Metadata) -> None:
        found = onnx_program(program)
        found.model.metadata_props.update(metadata)
        found.save(files[0])

    def quantize(self, files: list[Path]) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata

        model = onnx.load(files[0])
        add_pre_process_metadata(model)  # shapes are in it, which is all that would be asked for
        options = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
        quantize_dynamic(model, files[0], weight_type=QuantType.QInt8, **options)

    def load(self, files: list[Path], threads: int | None = None) -> Runnable:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        session = onnxruntime.InferenceSession(files[0], options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    def metadata(self, path: Path) -> Metadata:
        import onnxruntime

        return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map


class OpenVino(Format):
    """OpenVINO's two files, made from ONNX; checked in float32, which its CPU plugin may otherwise round."""

    name, ending, packages = "openvino", ".xml", ("onnx", "onnxscript", "openvino")
    section = "dinat_triton"

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]

    def write(self, program: ExportedProgram, files: list[Path], metadata: Metadata) -> None:
        import openvino

        path, weights = files
        found = onnx_program(program).model_proto.SerializeToString()
        model = openvino.Core().read_model(found)
        for name, value in metadata.items():
            model.set_rt_info(value, [self.section, name])
        openvino.save_model(model, path, compress_to_fp16=False)
        os.replace(path.with_suffix(".bin"), weights)

    def load(self, files: list[Path], threads: int | None = None) -> Runnable:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(*files), "CPU", {"PERFORMANCE_HINT": "LATENCY", **options})
        return lambda images: torch.from_numpy(compiled(images.numpy())[0])

    def metadata(self, path: Path) -> Metadata:
        import openvino

        return dict(openvino.Core().read_model(path).get_rt_info([self.section]).value)


class Aoti(Format):
    """AOTInductor: compiled for this kind of machine, needs torch to run and nothing else."""

    name, ending = "aoti", ".pt2"

    def write(self, program: ExportedProgram, files: list[Path], metadata: Metadata) -> None:
        # Frozen weights are packed for the matrix products, and all that depends on them alone is computed now.
        configs = {"freezing": True, "aot_inductor.metadata": metadata}
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(files[0]), inductor_configs=configs)

    def load(self, files: list[Path], threads: int | None = None) -> Runnable:
        return torch._inductor.aoti_load_package(str(files[0]))

    def metadata(self, path: Path) -> Metadata:
        return torch._inductor.aoti_load_package(str(path)).get_metadata()


class TorchScript(Format):
    """TorchScript, for libtorch and for what cannot read anything newer."""

    name, ending = "torchscript", ".pt"

    def write(self, program: ExportedProgram, files: list[Path], metadata: Metadata) -> None:
        graph = without_sizes(program)
        with warnings.catch_warnings(action="ignore"):  # torch would have everybody use what the other formats are
            traced = torch.jit.freeze(
                torch.jit.trace(graph, tuple(program.example_inputs[0]), check_trace=False).eval()
            )
            torch.jit.save(traced, str(files[0]), _extra_files={IN_FILE: json.dumps(metadata)})

    def load(self, files: list[Path], threads: int | None = None) -> Runnable:
        with warnings.catch_warnings(action="ignore"):
            return torch.jit.load(str(files[0]))

    def metadata(self, path: Path) -> Metadata:
        found = {IN_FILE: ""}
        with warnings.catch_warnings(action="ignore"):
            torch.jit.load(str(path), _extra_files=found)
        return json.loads(found[IN_FILE])


class Pt2(Format):
    """A program of `torch.export`: a graph of torch's own operations, to be compiled or read by other tools."""

    name, ending = "pt2", ".pt2"

    def write(self, program: ExportedProgram, files: list[Path], metadata: Metadata) -> None:
        torch.export.save(program, files[0], extra_files={IN_FILE: json.dumps(metadata)})

    def load(self, files: list[Path], threads: int | None = None) -> Runnable:
        return torch.export.load(files[0]).module()

    def metadata(self, path: Path) -> Metadata:
        found = {IN_FILE: ""}
        torch.export.load(path, extra_files=found)
        return json.loads(found[IN_FILE])


FORMATS: dict[str, Format] = {f.name: f for f in (Onnx(), OpenVino(), Aoti(), TorchScript(), Pt2())}


def format_of(name: str) -> Format:
    """The format of a name, if it can be written here."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    FORMATS[name].check_installed()
    return FORMATS[name]


def onnx_program(program: ExportedProgram) -> Any:
    """The program in ONNX's operations."""
    with warnings.catch_warnings(action="ignore"):
        return torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=["output"])


def without_sizes(program: ExportedProgram) -> torch.fx.GraphModule:
    """The program's graph, reading no sizes: tracing would keep the example's batch as a constant."""
    aten = torch.ops.aten
    sized = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)
    module = program.module()
    for node in module.graph.nodes:
        if node.target in sized:
            node.args = (node.args[0], [-1 if isinstance(n, torch.fx.Node) else n for n in node.args[1]])
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
