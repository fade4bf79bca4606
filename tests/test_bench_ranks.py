"""`mmkernels bench --ranks`: what it counts, that it refuses wrong results, and what it says of what it cannot do."""

import io
import json

import pytest
import torch
from ranks import on_ranks
from rich.console import Console

from mmkernels import cli
from mmkernels.bench import CASES, Request, contrastive_rank
from mmkernels.bench import contrastive_ranks as ranks
from mmkernels.bench.machine import environment
from mmkernels.bench.ranks_report import print_ranks
from mmkernels.ops.contrastive import distributed

QUICK = Request(ops=("clip_loss",), dtypes=(torch.float32,), quick=True)


def measure(request: Request = QUICK, counts=(2,)):
    return ranks.run(request, counts, environment(), lambda *_: None)


def test_figures_of_two_ranks(tmp_path, capsys):
    file = tmp_path / "figures.json"
    command = ["bench", "--ranks", "2", "--quick", "--op", "clip_loss", "--op", "siglip_loss", "--dtype", "float32"]
    assert cli.main([*command, "--json", str(file)]) == cli.RIGHT
    printed = capsys.readouterr().out
    assert "512x256, float32, 2 ranks" in printed and "ours / open_clip" in printed
    content = json.loads(file.read_text())
    assert content["env"]["unmeasured"] == []
    for op, peers in (("clip_loss", 1), ("siglip_loss", 2)):
        results = [x for x in content["results"] if x["op"] == op]
        assert [x["is_ours"] for x in results] == [False] * peers + [True]
        for x in results:
            assert x["ranks"] == 2 and x["error"] <= x["error_budget"]
            assert 0 < x["ms_p10"] <= x["ms"] <= x["ms_p90"] and x["cpu_seconds"] > 0 and x["peak_bytes"] > 0
            if x["wire_bytes"] is not None:  # packets' heads, sizes and scalars come on top
                assert 0.98 * x["sent_bytes"] <= x["wire_bytes"] <= 1.05 * x["sent_bytes"] + 8192
    ours = next(x for x in content["results"] if x["is_ours"] and x["op"] == "clip_loss")
    assert ours["sent_bytes"] == 256 * 256 * (4 + 4) + 3 * 4 * 512


def test_a_wrong_result_gets_no_figure(monkeypatch, decoy):
    monkeypatch.chdir(decoy)

    def wrong(*args, real=ranks._on_ranks):
        found = real(*args)
        for of_rank in found["mmkernels:cpu"]:
            of_rank["values"]["d_text_features"] *= 1.01
        return found

    monkeypatch.setattr(ranks, "_on_ranks", wrong)
    report = measure()
    assert not report.passed and [x["is_ours"] for x in report.results] == [False]
    (missed,) = report.unmeasured
    assert missed["is_ours"] and "d_text_features is off by" in missed["reason"]


def test_ranks_that_fail_are_told(monkeypatch):
    monkeypatch.setenv("MMKERNELS_BACKEND", "flash-attn")
    report = measure()
    assert not report.passed and not report.results
    (missed,) = report.unmeasured
    assert "flash-attn" in missed["reason"]
    file = io.StringIO()
    print_ranks(Console(file=file, width=300), report)
    assert "no figure: clip_loss 512x256 float32 fwd_bwd 2 mmkernels: " in file.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "1"], "from 2 on"),
        (["--ranks", "2,x"], "from 2 on"),
        (["--ranks", "3", "--quick"], "not 512 on 3"),
        (["--ranks", "2", "--op", "patch_embed"], "clip_loss and siglip_loss"),
        (["--ranks", "2", "--model", "clip-vit-b-16"], "clip_loss and siglip_loss"),
        (["--ranks", "2", "--pass", "fwd"], "measured together"),
        (["--ranks", "2", "--case", "2048x6144x512"], "no case is called '2048x6144x512'"),
    ],
)
def test_what_it_refuses(options, said, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["bench", "--device", "cpu", *options])
    assert refused.value.code == cli.USAGE and said in capsys.readouterr().err


def test_what_is_measured_unless_asked_otherwise():
    assert {case.name for case in ranks.selected(Request())} == {"4096x512", "16384x512"}
    assert not any(case.texts or case.captions for case in ranks.SQUARE) and len(ranks.SQUARE) < len(CASES)


def test_bytes_on_paper(monkeypatch):
    case = next(case for case in ranks.SQUARE if (case.op, case.name) == ("clip_loss", "4096x512"))
    count = 3 * 1024 * 512  # numbers that a rank of 4 hands on where all texts move once
    statistics = 3 * 4 * 4096 * 2 * 3 // 4
    assert ranks.sent_bytes("open_clip local_loss", case, torch.bfloat16, 4) == 4 * 2 * count
    assert ranks.sent_bytes("mmkernels:cpu", case, torch.bfloat16, 4) == (2 + 4) * count + statistics
    monkeypatch.setattr(distributed, "GATHERED_BYTES", 2**20)
    assert ranks.sent_bytes("mmkernels:cpu", case, torch.bfloat16, 4) == (2 + 2 + 4) * count + statistics


def test_pieces():
    """CLIP's, which are gathered twice, by the gibibyte; SigLIP's from 64 MiB on, four at most until then."""
    for texts, clip, siglip in ((100, 1, 1), (16384, 1, 2), (2**17, 1, 4), (2**18, 2, 4), (2**20, 6, 6)):
        found = [distributed.count_pieces(op, texts, 512, 10**6, torch.float32) for op in ranks.OPS_ACROSS]
        assert found == [clip, siglip], texts
    assert distributed.count_pieces("siglip_loss", 2**20, 512, 3, torch.float32) == 3  # no empty ones


def check_a_broken_peer(rank: int, count: int) -> None:
    class Broken:
        def __init__(self, **here):
            pass

        def __call__(self, *args):
            raise ValueError("not on this machine")

    contrastive_rank.siglip_kernel = lambda *_: Broken
    task = {"op": "siglip_loss", "case": "512x256", "dtype": "float32", "device": "cpu", "seed": 0, "seconds": 0.0}
    found = contrastive_rank._Rank(rank, count, task | {"own_network": False}).measured()
    assert found["siglip-kernel"] == {"reason": "ValueError: not on this machine"}
    assert all("values" in x for name, x in found.items() if name != "siglip-kernel") and len(found) == 4


def test_a_peer_that_fails_is_told_and_the_others_are_measured(tmp_path):
    on_ranks(2, tmp_path, check_a_broken_peer)
