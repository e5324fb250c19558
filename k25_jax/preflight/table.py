"""Reports of the preflight as text for a terminal."""

from collections.abc import Sequence

from k25_jax.preflight.aot import GB, Report, Tensor


def render(report: Report) -> str:
    """The whole report, a line a figure; figures are those of one device and one step."""
    mesh = " x ".join(f"{name} {n}" for name, n in report.mesh.items())
    chips = f"{report.chips} chip{'s' * (report.chips != 1)}, mesh {mesh}" if report.hbm_gb else f"mesh {mesh}"
    lines = [
        f"{report.topology}: {chips}; in a step {report.rows} rows, packs of patches: {report.packs}",
        f"memory     {_memory(report)}",
    ]
    lines += [f"note       {note}" for note in report.notes]
    lines += map(_tried, report.tried)
    if report.temp_gb or report.fits:
        lines.append(
            f"           arguments {report.argument_gb:.2f} GB, results beside them "
            f"{report.output_gb - report.alias_gb:.2f}, temporaries {report.temp_gb:.2f}, program {report.code_gb:.2f}"
        )
    if report.host_gb:
        lines.append(f"           beside it {report.host_gb:.2f} GB in the host's memory for each device")
    compiled = f", {report.flops_compiled:.3e} after the compiler" if report.flops_compiled else ""
    lines.append(f"FLOPs      {report.flops_asked:.3e} as an equal share of what the step asks for{compiled}")
    if report.hbm_bytes:
        lines.append(
            f"traffic    {report.hbm_bytes / GB:.4g} GB of memory, intensity {report.intensity:.0f} FLOPs a byte"
        )
    lines += map(_axis, report.axes)
    lines += map(_exchange, report.collectives)
    lines += _bound(report)
    if report.unknown_loops:
        lines.append(f"           {report.unknown_loops} loops of unknown length count once")
    lines.append(
        f"took       {report.lower_s:.0f} s to lower, {report.compile_s:.0f} s to compile, {report.rss_gb:.1f} GB here"
    )
    lines.append("largest    on one device:")
    lines += [_row(Tensor(**tensor)) for tensor in report.largest]
    return "\n".join(lines)


def _axis(entry: dict) -> str:
    near, plain, rate = entry["hops"], entry["hops_in_plain_order"], entry["gather_rate"] / GB
    links = f"gathers {rate:.0f} GB/s" if rate else "between slices"
    hops = f"{near:.2f} hops to the next ({plain:.2f} in plain order)"
    return f"axis       {entry['axis']:8s}{entry['devices']:4d} devices, {hops}, {links}"


def _exchange(entry: dict) -> str:
    axes = " x ".join(entry["axes"]) or "itself"
    took = f", {entry['seconds']:.3g} s" if entry["seconds"] else ""
    return f"exchange   {entry['kind']:19s}over {axes:22s}{entry['bytes'] / GB:.4g} GB in {entry['times']:.0f}{took}"


def _bound(report: Report) -> list[str]:
    if not report.step_seconds_bound:
        return []
    seconds = ", ".join(f"{name} {value:.3g}" for name, value in report.bounds.items() if value)
    return [
        f"bound      {report.step_seconds_bound:.4g} s a step, by {report.bound_by}; MFU at most {report.mfu_bound:.1%}",
        f"           at least, in seconds: {seconds}; all exchanges one after the other {report.exchange_seconds:.3g}",
    ]


def _tried(entry: dict) -> str:
    word = "fits" if entry["fits"] else "does not"
    return (
        f"instead    {word}: {entry['peak_hbm_gb']:.2f} GB with {' '.join(entry['flags'])} ({entry['seconds']:.0f} s)"
    )


def _memory(report: Report) -> str:
    if not report.hbm_gb:
        return f"{report.peak_hbm_gb:.2f} GB at the peak"
    if report.fits:
        return f"fits: {report.peak_hbm_gb:.2f} GB at the peak of {report.hbm_gb:.0f} GB"
    return f"DOES NOT FIT: {report.reason}"


def render_layout(tensors: Sequence[Tensor]) -> str:
    """Every array: bytes on one device, name, type, shape and the mesh axes of its dimensions."""
    total, host = (sum(tensor.bytes for tensor in tensors if tensor.host == where) for where in (False, True))
    beside = f", beside {host / GB:.4f} in its host's memory" if host else ""
    return "\n".join([*(_row(tensor) for tensor in tensors), f"{total / GB:11.4f} GB in all on one device{beside}"])


def _row(tensor: Tensor) -> str:
    shape, where = "x".join(map(str, tensor.shape)), " on the host" if tensor.host else ""
    return f"{tensor.bytes / GB:11.4f} GB  {tensor.name:55s} {tensor.dtype} {shape} [{tensor.layout}]{where}"
