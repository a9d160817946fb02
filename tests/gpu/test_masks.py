"""A pool runs on the GPUs that its mask names, or not at all: never on a neighbour."""

from __future__ import annotations

import re

import pytest

from pool_managerd.config.load import load_config
from pool_managerd.errors import SpecError
from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import GIB, cards, run_cli, until
from tests.host.simulated import A100, MIG, MIG_UUIDS, eight_80, gpu_uuid
from tests.system.nodes import alive

ONE_MIG, OTHER_MIG = MIG_UUIDS


def test_a_pool_on_a_mig_instance_sees_that_alone_and_does_not_outlive_it(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("slice", devices=[OTHER_MIG], gib=5), fake("auto", tensor_split="auto", gib=16, preload=False)]
    node = make_node(MIG, "engines vram=1GiB", pools=pools).start()
    node.until_ready("slice")
    engine = node.status("slice")["pid"]
    assert node.environment("slice")["CUDA_VISIBLE_DEVICES"] == OTHER_MIG
    assert node.metric("pool_vram_total_bytes", pool_id="slice") == node.metric("vram_total_bytes", device=OTHER_MIG) == 20 * GIB
    parent, first, second = node.devices()["devices"]
    assert parent["mig_enabled"] and first["parent_uuid"] == second["parent_uuid"] == gpu_uuid(0)
    assert (first["reservations"], second["reservations"][0]["pids"]) == ([], [engine])
    # 16 GiB fit neither into 10 nor into what is left of 20, and two instances are not put together for it.
    node.post("/v1/pools/auto/start")
    node.until_refused("auto", "cannot start pool auto", "it needs 16 GiB")

    node.become(A100)
    until(lambda: not node.status("slice")["ready"], "the pool to be un-ready")
    assert OTHER_MIG in node.status("slice")["last_error"]
    until(lambda: not alive(engine), "its engine to end")
    node.until_ready("auto")
    assert node.environment("auto")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(0), "the whole GPU, now that it is one"


def test_turning_mig_on_ends_what_ran_on_the_whole_gpu_and_says_what_to_name_instead(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(A100, "engines vram=1GiB", pools=[fake("whole", devices=[0], gib=5)]).start()
    node.until_ready("whole")
    engine = node.status("whole")["pid"]
    node.become(MIG)
    until(lambda: not alive(engine), "the engine to end", 10, lambda: node.status("whole"))
    node.until_refused("whole", "GPU 0 is in MIG mode now: name one of its instances")
    node.become(A100)
    node.until_ready("whole")


def test_a_mask_that_this_machine_cannot_give_is_refused_at_the_start(make_node: MakeNode, fake: MakePool) -> None:
    wrong: dict[str, tuple[list[int | str], str]] = {
        "mig": ([0], "GPU 0 is in MIG mode and cannot be used as a whole"),
        "index": ([7], "there is no device 7"),
        "twice": ([1, gpu_uuid(1)], "are the same device"),
        "uuid": (["MIG-00000000-0000-4000-8000-999999999999"], "there is no device MIG-00000000"),
    }
    beside = f'gpu 1 uuid={gpu_uuid(1)} name="NVIDIA A100" pci=0000:02:00.0 cc=8.0 vram=80GiB reserved=600MiB'
    node = make_node(MIG, beside, pools=[fake(name, devices=devices) for name, (devices, _) in wrong.items()]).start()
    for name, (_, says) in wrong.items():
        assert node.until_refused(name, says).startswith("cannot use the device mask")
        status = node.status(name)
        assert (status["state"], status["reason"]) == ("failed", "config_error")
        assert not (node.run / f"engine-{name}.log").exists()


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ("0,,1", "it has an empty part"),
        ("-1", "-1 is negative"),
        ([-1], "-1 is negative"),
        ("0,1,0", "it names 0 twice"),
        ("0,GPU0", "it names 0 twice"),
        ([ONE_MIG, gpu_uuid(1)], "it mixes MIG instances with whole GPUs"),
        ([ONE_MIG, 1], "it mixes MIG instances with whole GPUs"),
        ("first", "'first' is neither an index nor a GPU or MIG UUID"),
    ],
)
def test_a_mask_that_can_never_be_right_is_refused_with_its_line(
    devices: object, says: str, make_node: MakeNode, fake: MakePool
) -> None:
    node = make_node(cards(24), pools=[fake("p", devices=devices)])
    with pytest.raises(SpecError) as refused:
        load_config(node.config, env={}, overrides={})
    assert says in str(refused.value) and re.search(r"pm\.yaml:\d+:\d+: pools\[0\]\.devices: ", str(refused.value)), refused.value


def test_config_check_tells_of_such_a_mask(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(cards(24), pools=[fake("p", devices="0,,1")])
    refused = run_cli("config", "check", str(node.config), folder=node.folder)
    assert refused.returncode == 1 and "it has an empty part" in refused.stderr, refused


def test_across_a_restart_a_pool_stays_on_its_gpu_or_in_its_slot_or_refuses(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("third", devices=[3], gib=5), fake("last", devices=[7], gib=5), fake("swapped", devices=[1], gib=5)]
    node = make_node(eight_80(), pools=pools).start()
    node.until_ready("third", "last", "swapped")
    assert node.environment("third")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(3)
    node.terminate()

    # Card 3 is gone; index 3 is card 4 now, and card 7 has become index 0. In the slot of card 1 there is another card.
    node.become(eight_80((7, 0, 1, 2, 4, 5, 6)).replace(gpu_uuid(1), gpu_uuid(100)))
    node.start()
    node.until_ready("last", "swapped")
    assert node.environment("last")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(7)
    assert any("7 is 0 now" in line["human"] for line in node.lines("notice")), node.lines("notice")
    error = node.until_refused("third", f"GPU 3 was {gpu_uuid(3)}", "which is gone")
    assert gpu_uuid(4) in error
    assert [d["reservations"] for d in node.devices()["devices"] if d["uuid"] not in (gpu_uuid(7), gpu_uuid(100))] == [[]] * 5
    assert node.environment("swapped")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(100)


def test_what_befalls_a_gpu_in_mig_mode_befalls_its_instances(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("slice", devices=[OTHER_MIG], gib=5), fake("late", devices=[ONE_MIG], gib=5, preload=False)]
    node = make_node(MIG, "engines vram=1GiB", pools=pools).start()
    node.until_ready("slice")
    node.command("devices", "cordon", "0")
    assert node.status("slice")["ready"]
    node.post("/v1/pools/late/start")
    node.until_refused("late", "cannot start pool late: GPU 0 is cordoned")
    node.command("devices", "uncordon", "0")
    node.until_ready("late")

    node.become(MIG, "xid gpu=0 code=79 serial=1")
    until(lambda: not node.status("slice")["live"] and not node.status("late")["live"], "both to be ended")
    assert "Xid 79" in node.status("slice")["last_error"] and "Xid 79" in node.status("late")["last_error"]


def test_the_gpus_that_the_daemon_was_granted_are_the_only_ones(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(cards(24, 24, 24), pools=[fake("a", vram_bytes="20GiB"), fake("b", vram_bytes="20GiB", preload=False)])
    node.env["CUDA_VISIBLE_DEVICES"] = "1"
    node.start().until_ready("a")
    assert [row["device"] for row in node.devices()["devices"]] == ["1"]
    assert node.environment("a")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(1)
    assert "Only some GPUs are used: CUDA_VISIBLE_DEVICES of the daemon names 1" in node.text()
    assert node.post("/v1/pools/b/start")[0] == 202
    node.until_refused("b", "needs 20 GiB", "GPU 1")


def test_the_configuration_may_keep_the_node_off_some_gpus(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(
        cards(24, 24), pools=[fake("a", vram_bytes="2GiB", devices=[0], preload=False)], gpu={"devices": [1]}
    ).start()
    assert node.post("/v1/pools/a/start")[0] == 202
    node.until_refused("a", "there is no device 0; there are 1")


def test_an_index_is_not_bound_for_good_while_a_gpu_is_missing(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("a", devices=[0], vram_bytes="2GiB"), fake("b", devices=[1], vram_bytes="2GiB", preload=False)]
    node = make_node(cards(24, 12), pools=pools)
    node.become(cards(24, 12), "fault gpu=0 gone")
    node.start().until_ready("a")
    assert node.environment("a")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(1)
    assert "for this start only: the driver lists 1 of its 2 GPUs" in node.text()
    node.become(cards(24, 12))
    until(lambda: len(node.devices()["devices"]) == 2, "the GPU to be back", 30)
    assert node.post("/v1/pools/a/restart?wait=true")[0] == 200 and node.post("/v1/pools/b/start?wait=true")[0] == 200
    assert [node.environment(pool)["CUDA_VISIBLE_DEVICES"] for pool in "ab"] == [gpu_uuid(0), gpu_uuid(1)]


def test_an_index_is_not_bound_for_good_while_fewer_gpus_are_there_than_the_configuration_names(
    make_node: MakeNode, fake: MakePool
) -> None:
    pools = [fake("a", devices=[0], vram_bytes="2GiB"), fake("b", devices=[1], vram_bytes="2GiB", preload=False)]
    without_the_first = "\n".join(line for line in cards(24, 12).splitlines() if not line.startswith("gpu 0 ")) + "\n"
    node = make_node(without_the_first, pools=pools).start()
    node.until_ready("a")
    assert node.environment("a")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(1)
    node.become(cards(24, 12))
    until(lambda: len(node.devices()["devices"]) == 2, "the first GPU to be there", 30)
    assert node.post("/v1/pools/a/restart?wait=true")[0] == 200
    assert node.environment("a")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(0)
