"""An inference engine in a process of its own: `python engine_worker.py ENGINE FOLDER THREADS`.

It imports nothing of this project, since engines may want another Python. `FOLDER/layers.npz` has the weights
[out, in] in order, each followed by ReLU; `FOLDER/x.npy` the input. Each line of standard input is one call, answered
by a line. The line "save" writes the result to `FOLDER/y.npy` too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def onnx_model(weights: list[Any], tokens: int) -> Any:
    """The layers as MatMul and Relu nodes, with the weights as constants."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, name = [], [], "x"
    for index, weight in enumerate(weights):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{index}"], [f"z{index}"]))
        name = "y" if index == len(weights) - 1 else f"a{index}"
        nodes.append(helper.make_node("Relu", [f"z{index}"], [name]))
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, [tokens, width])
        for end, width in (("x", weights[0].shape[1]), ("y", weights[-1].shape[0]))
    ]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


def onnx_runtime(model: Any, folder: Path, x: Any, threads: int) -> Callable[[], Any]:
    """ONNX Runtime, which multiplies zeros like everything else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(["y"], {"x": x})[0]


def deep_sparse(model: Any, folder: Path, x: Any, threads: int) -> Callable[[], Any]:
    """DeepSparse, which compiles the zeros into its program."""
    import onnx
    from deepsparse import Engine

    path = folder / "stack.onnx"
    onnx.save(model, str(path))
    engine = Engine(model=str(path), batch_size=x.shape[0], num_cores=threads)
    return lambda: engine.run([x])[0]


ENGINES = {"ONNX Runtime": onnx_runtime, "DeepSparse": deep_sparse}


def main(name: str, folder: Path, threads: int) -> None:
    """Load, say "ready", then answer."""
    replies, sys.stdout = sys.stdout, sys.stderr  # engines print their banners
    x = np.load(folder / "x.npy")
    with np.load(folder / "layers.npz") as layers:
        weights = [layers[key] for key in sorted(layers, key=int)]
    try:
        run = ENGINES[name](onnx_model(weights, len(x)), folder, x, threads)
        run()
    except Exception as error:  # whatever an engine dies of is the line that the reader gets
        print(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}", file=replies, flush=True)
        return
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        result = run()
        if line.strip() == "save":
            np.save(folder / "y.npy", result)
        print("done", file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
