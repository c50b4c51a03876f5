"""A bridge of two network interfaces that delays and drops frames, for kernels without `tc netem`.

    netem.py IF_A IF_B [--delay MS] [--loss PERCENT] [--seed N]     runs until SIGTERM
    netem.py --offload-off IF

Each frame is held DELAY ms and dropped with LOSS %, in each direction. It runs in the network namespace that
owns both interfaces. Segmentation offload must be off at both ends, else one "frame" is up to 64 KB and so is
a loss.
"""
from __future__ import annotations

import argparse
import array
import fcntl
import heapq
import random
import select
import signal
import socket
import struct
import sys
import time
from itertools import count

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_VNET_HDR = 15  # frames keep their checksum-offload header
PACKET_IGNORE_OUTGOING = 23
SIOCETHTOOL = 0x8946
ETHTOOL_OFFLOADS = (0x1F, 0x24, 0x2C)  # STSO, SGSO, SGRO
LARGEST_FRAME = 70_000
FRAMES_PER_TURN = 64


def offload_off(interface: str) -> None:
    control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for command in ETHTOOL_OFFLOADS:
        value = array.array("B", struct.pack("II", command, 0))
        request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
        fcntl.ioctl(control, SIOCETHTOOL, request)


def open_port(interface: str) -> socket.socket:
    offload_off(interface)
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    port.bind((interface, ETH_P_ALL))
    port.setblocking(False)
    return port


class Bridge:
    def __init__(self, a: str, b: str, delay_s: float, loss: float, seed: int | None) -> None:
        ends = open_port(a), open_port(b)
        self.other = {ends[0].fileno(): ends, ends[1].fileno(): (ends[1], ends[0])}
        self.delay_s, self.loss = delay_s, loss
        self.random = random.Random(seed)
        self.queue: list[tuple[float, int, socket.socket, bytes]] = []
        self.order = count()
        self.poll = select.poll()
        for fd in self.other:
            self.poll.register(fd, select.POLLIN)

    def run(self) -> None:
        while True:
            self.send_due()
            wait_ms = max(0.0, self.queue[0][0] - time.monotonic()) * 1000 if self.queue else None
            for fd, events in self.poll.poll(wait_ms):
                source, target = self.other[fd]
                if events & select.POLLIN:
                    self.receive(source, target)
                else:  # the link went down: clear the error and keep going
                    source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def send_due(self) -> None:
        while self.queue and self.queue[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(self.queue)
            try:
                target.send(frame)
            except OSError:  # link down or queue full: a wire loses the frame as well
                continue

    def receive(self, source: socket.socket, target: socket.socket) -> None:
        for _ in range(FRAMES_PER_TURN):
            try:
                frame = source.recv(LARGEST_FRAME)
            except OSError:  # nothing more to read, or the link went down
                return
            if self.random.random() >= self.loss:
                heapq.heappush(self.queue, (time.monotonic() + self.delay_s, next(self.order), target, frame))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("interfaces", nargs="*")
    parser.add_argument("--offload-off", metavar="IF")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS")
    parser.add_argument("--loss", type=float, default=0.0, metavar="PERCENT")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    if options.offload_off:
        offload_off(options.offload_off)
        return
    if len(options.interfaces) != 2:
        parser.error("two interfaces are needed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    bridge = Bridge(*options.interfaces, options.delay / 1000, options.loss / 100, options.seed)
    print("ready", flush=True)
    bridge.run()


if __name__ == "__main__":
    main()
