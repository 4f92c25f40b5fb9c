"""A plan as text, one step a line: for `inspect --plan` and `compile --dump`."""

from __future__ import annotations

from .plan import Argument, Plan, PlanTensor, Step


def to_text(plan: Plan) -> str:
    """The whole plan: sizes, the network's tensors, then the steps in their order."""
    lines = [f"plan {plan.engine}: arena {plan.arena_bytes} bytes, weights {plan.weights_bytes} bytes"]
    if plan.features:
        lines.append(f"needs {', '.join(plan.features)}")
    if plan.tolerance:
        lines.append(f"tolerance {plan.tolerance} steps")
    lines.append(f"pixels {'by a table' if plan.pixel_table else 'p - 128'}")
    lines += [_tensor(tensor) for tensor in plan.tensors]
    lines += [f"{index}: {_step(step)}" for index, step in enumerate(plan.steps)]
    return "\n".join(lines) + "\n"


def _tensor(tensor: PlanTensor) -> str:
    shape = ",".join(map(str, tensor.shape))
    quant = f" scale={tensor.scale!r} zero_point={tensor.zero_point}" if tensor.scale else ""
    return f"{tensor.kind} {tensor.name}: {tensor.dtype}[{shape}]{quant} at arena+{tensor.offset_bytes}"


def _step(step: Step) -> str:
    arguments = list(step.arguments)
    written = arguments.pop(step.output)
    work = f"{step.tasks} tasks"
    if step.launch is not None:
        groups, size = ("x".join(map(str, numbers)) for numbers in (step.launch.groups, step.launch.group_size))
        work = f"{groups} groups of {size}"
        work += f" with {step.launch.shared_bytes} bytes shared" if step.launch.shared_bytes else ""
    text = f"{step.name} = {step.kind}: {step.kernel}({', '.join(map(_argument, arguments))}) -> {_argument(written)}"
    text += f"; {work}" + (f"; {step.macs} macs" if step.macs else "")
    return f"{text} @{step.path}" if step.path and step.path != step.name else text


def _argument(argument: Argument) -> str:
    return f"{argument.space}+{argument.offset_bytes} {argument.dtype}[{argument.count}]"
