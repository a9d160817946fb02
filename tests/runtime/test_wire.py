from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.runtime import wire

messages = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20)), max_size=5)


@given(messages, st.integers(1, 7))
def test_frames_survive_any_cut(frames: list[dict[str, object]], step: int) -> None:
    data = b"".join(wire.encode(frame) for frame in frames)
    decoder = wire.Decoder()
    arrived = [frame for start in range(0, len(data), step) for frame in decoder.feed(data[start : start + step])]
    assert arrived == frames


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01x", b"\x00\x00\x00\x02[]"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError, match="cannot read a frame"):
        wire.Decoder().feed(data)


def test_a_message_that_no_receiver_takes_is_not_sent() -> None:
    with pytest.raises(wire.WireError, match="cannot send"):
        wire.encode({"x": "y" * wire.MAX_FRAME_BYTES})


def test_silence_and_an_end_read_as_none() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert wire.receive(ours, 0.01) is None
        theirs.close()
        assert wire.receive(ours, 1) is None
