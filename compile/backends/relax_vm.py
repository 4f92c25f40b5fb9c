"""The same kernels as a standard TVM library: a Relax function that calls them in order, for TVM's virtual machine."""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from ...models import graph as ir
from ...targets.spec import TargetSpec
from ..kernels.kernel_call import Activation, KernelCall
from .assembly import output_index
from .cpu import export, llvm_target, lower


def build(graph: ir.Graph, target: TargetSpec) -> bytes:
    """Given: an int8 graph of batch 1. Result: a shared object whose ``main`` maps the network's input to its output.

    It loads with ``tvm.runtime.load_module`` wherever a TVM runtime is installed; ``tvm.relax.VirtualMachine`` runs it
    on one thread. The weights are inside. Raises what ``tvm.build`` raises.
    """
    module = assemble(graph, lower(graph, target))
    executable = tvm.compile(module, target=llvm_target(target), relax_pipeline=_lower_calls(), tir_pipeline="tirx")
    return export(executable, target)


def _lower_calls() -> tvm.transform.Pass:
    """Relax's build pipeline without what looks into kernels for operators to fuse: it expects TVM's own schedules."""
    return tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def assemble(graph: ir.Graph, calls: tuple[KernelCall, ...]) -> tvm.IRModule:
    """A module of the distinct kernels and of ``main``, which calls each with all of its tasks."""
    builder = relax.BlockBuilder()
    distinct = {call.symbol: call for call in calls}
    kernels = {symbol: builder.add_func(output_last(call), symbol) for symbol, call in distinct.items()}
    inputs = [relax.Var(node.name, relax.TensorType(node.type.shape, node.type.dtype)) for node in graph.inputs]
    values: dict[str, relax.Expr] = {}

    def flat(name: str, count: int) -> relax.Expr:
        """The first ``count`` elements of a tensor, in place: a kernel may read less than was written."""
        value = values[name]
        if value.ty.shape.values[0] == count and len(value.ty.shape.values) == 1:
            return value
        return builder.emit(relax.op.memory.view(value, (count,)))

    with builder.function("main", inputs):
        with builder.dataflow():
            values.update({node.name: variable for node, variable in zip(graph.inputs, inputs, strict=True)})
            for call in calls:
                written = output_index(call)
                target = call.operands[written]
                assert isinstance(target, Activation)
                args = [
                    flat(operand.name, operand.count)
                    if isinstance(operand, Activation)
                    else relax.const(operand.data, str(operand.data.dtype))
                    for index, operand in enumerate(call.operands)
                    if index != written
                ]
                args += [tirx.const(0, "int32"), tirx.const(call.tasks, "int32")]
                kind = relax.TensorType((target.count,), target.dtype)
                values[target.name] = builder.emit(relax.call_tir(kernels[call.symbol], args, kind))
            results = []
            for name in graph.outputs:
                shaped = builder.emit(relax.op.memory.view(values[name], graph.node(name).type.shape))
                results.append(builder.emit_output(shaped))
        builder.emit_func_output(results[0] if len(results) == 1 else relax.Tuple(results))
    return builder.finalize()


def output_last(call: KernelCall) -> tirx.PrimFunc:
    """The kernel with its parameters as ``call_tir`` passes them: tensors read, ``begin``, ``end``, tensor written."""
    function = call.build()
    parameters = list(function.params)
    parameters.append(parameters.pop(output_index(call)))
    return tirx.PrimFunc(parameters, function.body, function.ret_type, function.attrs)
