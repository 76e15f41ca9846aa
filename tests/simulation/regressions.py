"""
Seeds that failed once, and why: each is run every time.

The worlds are made from their seeds by the code as it is, so a change to ``world`` makes other worlds of them: what they found
has a test of its own as well, which is named here.
"""

from __future__ import annotations

FOUND = {
    12: "a dispatcher that was full span while a throttled lane's time had come (tests/test_dispatcher.py)",
    3: "a session that ended while it began to listen was an internal error (tests/postgres/test_owner.py)",
    80: "a row that fell due before the place of an ended endpoint's rows was never read (tests/test_feed.py)",
    82: "a daemon that lost its session in the moment in which it was told to stop never ended (test_found.py)",
    123: "a delivery held over a lost session was sent twice and broke the timer (tests/test_dispatcher.py)",
    16: "a delivery in flight was forwarded with its endpoint and sent by both owners (tests/test_feed.py)",
    19: "a delivery of an endpoint that had moved was settled by an owner that had given up its shard (tests/test_feed.py)",
    295: "the head of an order key passed over an older row that committed late (tests/test_feed.py)",
    314: "an older row that was forwarded counted as later (tests/test_feed.py)",
    488: "a row that arrived while its endpoint was thought to be in another shard was never read (tests/test_feed.py)",
    745: "a row in a shard that its endpoint had left was passed by, and forgotten when that was gained (tests/test_feed.py)",
    905: "a row that was to end before its time was sent before its time: its endpoint was resumed (tests/test_feed.py)",
    966: "the same as 745",
    1676: "due times of an endpoint that had moved away were kept, and hid later ones when its shard came here (tests/test_feed.py)",
    3171: "an endpoint that changed while its shard was recovered was never read again (tests/test_feed.py)",
    20690: "a retry that another owner had made of a delivery in flight here was never read (tests/test_feed.py)",
    94924: "a result that outlived its session was settled in a shard that its row had been forwarded to (tests/postgres/test_owner.py)",
    55609: "an older row of an order key arrived in a shard that its endpoint had left, and was not taken for older (tests/test_feed.py)",
    44984: "an older row of an order key came into a shard that another owner read, and was passed over (tests/test_feed.py)",
    39455: "a retry in a shard that its endpoint had left was forgotten when the endpoint's new shard was left (tests/test_feed.py)",
    35248: "a result that half of a refused batch had settled passed for unwritten, and was not forwarded (tests/test_recorder.py)",
    2592: "the model ended a session for a silence that had been broken (the check was wrong)",
    775: "a reload that gave a host a rate: exchanges begun before it do not wait for a turn (the check was wrong)",
}
"""What it found with faults that a seed does not have of itself is in ``test_found``, or beside what was wrong."""
