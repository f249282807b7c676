"""The TPU compiler in a process of its own: one program in, one JSON file out.

    python3 -m algpt2.tpu.tpu_compiler REQUEST.json

libtpu writes to stderr, aborts on its own errors and may crash when the interpreter exits, so
`dry_run.compile_program` starts this process for it. The request names the serialized HLO module of
one replica (`program`), the slice (`topology`, `chip_config`, `accelerator_type`) and the file to
write (`answer`). The answer holds bytes per core as XLA counts them, FLOPs, seconds to compile
and the cycles that the compiler expects; or `error`, XLA's message.
"""

import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

QUIET = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled"}
# Ask no metadata server for the slice's hosts; open and lock no device.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
PRODUCTS = "matrix products"
# What an operation is for, by its name in TensorFlow's graph; the first that is found counts.
_KINDS = {
    "dropout": "dropout", ".attn": "attention", ".mlp": "MLP", "cond/": "optimizer",
}  # fmt: skip


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """Compile the program of `request`; return the fields of `dry_run.Compiled`.

    Raises:
        RuntimeError: libtpu has another number of devices; XLA's errors pass through.
    """
    os.environ.update(QUIET | NO_TPU | {"TPU_ACCELERATOR_TYPE": request["accelerator_type"]})
    from jax._src.interpreters.mlir import make_ir_context
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies
    from jax.extend.mlir import hlo_to_stablehlo

    chip = {"chip_config_name": request["chip_config"]} if request["chip_config"] else {}
    topology = topologies.get_topology_desc(request["topology"], "tpu", **chip)
    devices = list(topology.devices)
    if len(devices) != request["n_devices"]:
        raise RuntimeError(f"expected {request['n_devices']} devices, libtpu has {len(devices)}")
    with make_ir_context():
        module = ir.Module.parse(hlo_to_stablehlo(Path(request["program"]).read_bytes()))
        _drop_copies(module.operation)
        start_s = time.perf_counter()
        executable = _compile(module, devices)
        seconds = time.perf_counter() - start_s
    memory = executable.get_compiled_memory_stats()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops": executable.cost_analysis()["flops"],
        "seconds": seconds,
        "cycles": cycles_by_kind("\n".join(one.to_string() for one in executable.hlo_modules())),
    }


def cycles_by_kind(text: str) -> dict[str, int]:
    """Cycles of one run of an optimized HLO module, as the compiler estimates them, by kind.

    The estimates are `estimated_cycles` in the `backend_config` of each instruction; communication
    has none. A fusion with a matrix product in it is a matrix product. {} if a loop has no
    `known_trip_count`.
    """
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\n((?:.*\n)*?)\}", text, re.MULTILINE))
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    has_product = {
        name for name, body in bodies.items() if re.search(r" (convolution|dot)\(", body)
    }

    def count(name: str) -> Counter[str]:
        cycles: Counter[str] = Counter()
        for line in bodies[name].splitlines():
            called = re.findall(r"(?:calls|body|to_apply|\w+_computation)=%?([\w.-]+)", line)
            if branches := re.search(r"branch_computations=\{(.*?)\}", line):
                called += [branch.strip(" %") for branch in branches[1].split(",")]
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
                is_product = has_product.intersection(called) or " convolution(" in line
                cycles[PRODUCTS if is_product else _kind(line)] += int(estimate[1])
            elif " while(" in line:
                n = int(re.search(r'"known_trip_count":\{"n":"(\d+)"', line)[1])
                cycles += Counter({kind: n * value for kind, value in count(called[0]).items()})
            elif " conditional(" in line or " call(" in line:
                for each in called:
                    cycles += count(each)
        return cycles

    try:
        return dict(count(entry[1]).most_common())
    except TypeError:  # no known_trip_count
        return {}


def _kind(line: str) -> str:
    name = re.search(r'op_name="([^"]*)"', line)
    return next(
        (kind for key, kind in _KINDS.items() if name and key in name[1]), "norms, embedding, loss"
    )


def _compile(module: Any, devices: list[Any]) -> Any:
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import xla_client

    options = compiler.get_compile_options(
        num_replicas=len(devices),
        num_partitions=1,
        device_assignment=np.array([[device.id] for device in devices]),
    )
    return devices[0].client.compile(
        module, executable_devices=xla_client.DeviceList(tuple(devices)), compile_options=options
    )


def _drop_copies(operation: Any) -> None:
    """Replace each `mhlo.copy` by its operand: the TPU's client does not know that dialect."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in list(block.operations):
                _drop_copies(inner.operation)
                if inner.operation.name == "mhlo.copy":
                    inner.operation.results[0].replace_all_uses_with(inner.operation.operands[0])
                    inner.operation.erase()


def main() -> None:
    """Read the request, write its answer, leave without the interpreter's exit."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        answer = compile_request(request)
    except Exception as error:  # the other process tells the user
        answer = {"error": f"{type(error).__name__}: {error}"}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    os._exit(0)


if __name__ == "__main__":
    main()
