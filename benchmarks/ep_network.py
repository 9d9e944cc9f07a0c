"""Two machines simulated by network namespaces, joined by a link whose rate is limited in both directions."""

import os
import shutil
import subprocess
from contextlib import contextmanager

SUBNET = "10.77.0"


def why_not():
    """Return why this process cannot simulate machines, or None."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with two_nodes(100):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


@contextmanager
def two_nodes(mbit):
    """Give the names of two namespaces, n and its link device v each, joined at ``mbit`` Mbit/s; remove them after."""
    nodes = [f"moebench-{os.getpid()}-{node}" for node in range(2)]
    devices = [f"mv{os.getpid()}-{node}" for node in range(2)]

    def run(*words):
        subprocess.run(words, check=True, capture_output=True, text=True)

    try:
        for node in nodes:
            run("ip", "netns", "add", node)
        run("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for number, (node, device) in enumerate(zip(nodes, devices, strict=True)):
            run("ip", "link", "set", device, "netns", node)
            run("ip", "-n", node, "addr", "add", f"{SUBNET}.{number + 1}/24", "dev", device)
            run("ip", "-n", node, "link", "set", device, "up")
            run("ip", "-n", node, "link", "set", "lo", "up")
            # The burst is small against a message, else the bucket would be measured and not the link; the limit is so
            # large that no packet is dropped.
            shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "128kb", "limit", "64mb")
            run("ip", "netns", "exec", node, "tc", "qdisc", "replace", "dev", device, *shape)
        yield [(node, device) for node, device in zip(nodes, devices, strict=True)]
    finally:
        for node in nodes:  # a device goes with its namespace
            subprocess.run(("ip", "netns", "del", node), capture_output=True, check=False)


def start(node, device, rank, command, **options):
    """Start a command as ``rank`` inside a node, with gloo bound to the node's device."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": device, "TP_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": f"{SUBNET}.1", "MASTER_PORT": "29500", "RANK": str(rank)}
    return subprocess.Popen(["ip", "netns", "exec", node, *command], env=environment, **options)
