"""``deft-tvm serve-device``: let another machine's tuning measure its candidates here."""

from __future__ import annotations

import ipaddress
from socket import gethostname
from typing import Annotated

import typer

from deft_tvm.commands.common import console, needs_compiler
from deft_tvm.commands.progress import told


def serve_device(
    host: Annotated[
        str, typer.Option(help="Address to listen on; whoever can connect to it can run code.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port to listen on, another for each machine.")
    ] = 9090,
    tracker: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where TVM's tracker listens.")
    ] = "127.0.0.1:9190",
    key: Annotated[
        str,
        typer.Option(
            help="What to register as, the same for all machines with the same device; by default "
            "this device's name, as in `deft-tvm info`."
        ),
    ] = "",
) -> None:
    """Let `deft-tvm tune --rpc` on another machine compile and time candidates on this one.

    Machines find each other by TVM's tracker, which runs anywhere:
    `python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port 9190 --port-end 9191`. Ctrl-C ends the
    server and all that it has started.

    TVM's RPC asks nobody who he is and runs what it is given. So everything listens on 127.0.0.1,
    and the machine that tunes, with the tracker on it, comes through ssh; what to type there is
    printed.

    Example: deft-tvm serve-device --port 9090 --tracker 127.0.0.1:9190
    """
    needs_compiler("serve-device")
    from deft_tvm.tuning.serving import device_here, serve
    from deft_tvm.tuning.tracker import Address, check_tracker, tune_command

    address = Address.parse(tracker)
    check_tracker(address)  # before anything takes time
    tunnel = f"ssh -N -R {address.port}:{address} -L {port}:127.0.0.1:{port} {gethostname()}"
    if not _is_loopback(host):
        text = (
            f"WARNING: TVM's RPC has no authentication. Whoever can connect to {host}:{port} can "
            "run code on this machine as you. Without --host only this machine can; the tuning "
            f"machine then comes through `{tunnel}`, typed there."
        )
        typer.secho(text, err=True, fg="red", bold=True)
    with told() as say:
        say("looking what this machine is and reaches")
        device = device_here()
    out, key = console(), key or device.slug
    out.print(f"{device.name} ({device.slug}) serves on {host}:{port}")
    out.print("on the tuning machine:")
    if _is_loopback(host):
        out.print(f"    {tunnel}    (where it is another one)")
    out.print(f"    {tune_command(address, key)}")
    try:
        serve(host, port, address, key)
    except KeyboardInterrupt:
        out.print("stopped")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
