"""The committed page and plot are what the committed results give."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_bench_floors import LIMITS
from test_bench_offline_workload import QWEN3_30B

from isomoe.bench import docs
from isomoe.bench.floors import ModelCounts
from isomoe.bench.offline_engine import ExpertCount
from isomoe.bench.offline_report import WorkloadResult
from isomoe.bench.offline_workload import OfflineWorkload, Sample, standard_workloads
from isomoe.bench.profile import CATEGORIES, GAPS, Breakdown
from isomoe.bench.results import conditions, read_peers, slug, write
from isomoe.bench.roofline import Point, roofline_svg
from isomoe.errors import ConfigError

COUNTS = ModelCounts.of(QWEN3_30B)
SAMPLES = {
    "W1": Sample(seconds=1.0 + 255 * 3.4e-3, first_seconds=1.0),
    "W2": Sample(seconds=1.0 + 64 * 255 / 2750, first_seconds=1.0),
    "W3": Sample(seconds=65536 / 68_000),
    "W4": Sample(seconds=144_160 / 3_700),
}


def test_what_is_committed_is_what_the_results_give() -> None:
    assert docs.main(["--check"]) == 0, "run python -m isomoe.bench.docs"


def document(what: str, names: list[str], **others: Any) -> dict[str, Any]:
    peers = read_peers(QWEN3_30B)
    assert peers is not None
    results = []
    for name in names:
        work = standard_workloads()[name]
        result = WorkloadResult(work, [SAMPLES[name]] * 3, work.floor(COUNTS, LIMITS))
        if name == "W2":
            result.experts = ExpertCount(rows=64, steps=8, distinct=125.2, busiest=2.6)
            taken = {**dict.fromkeys(CATEGORIES, 100.0), GAPS: 300.0}
            result.breakdown = Breakdown(
                phase="decode",
                steps=10,
                span_us=1000.0,
                category_us=taken,
                launches=400.0,
                kernels=[("_norm", 97.0, 100.0)],
            )
        results.append(result)
    return {
        **conditions(what, f"isomoe bench {what}", "abc"),
        "date": "2026-11-25",
        "device": LIMITS.to_json(),
        "model": {"name": "qwen3-30b-a3b", "dtype": "bfloat16", **asdict(COUNTS)},
        "settings": {},
        "repeats": 3,
        "workloads": [result.to_json(COUNTS, peers) for result in results],
        "peers_conditions": peers["conditions"],
        **others,
    }


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Of results, and of a page without any."""
    results, pages = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    pages.mkdir()
    (pages / "benchmarks.md").write_text(f"before\n\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    return results, pages


def generated(folders: tuple[Path, Path]) -> str:
    results, pages = folders
    words = ["--results", str(results), "--docs", str(pages)]
    assert docs.main([*words, "--check"]) == 1
    assert docs.main(words) == 0
    assert docs.main([*words, "--check"]) == 0
    page = (pages / "benchmarks.md").read_text()
    assert page.startswith(f"before\n\n{docs.BEGIN}\n")
    assert page.endswith(f"{docs.END}\nafter\n")
    assert "old" not in page
    return page


def test_without_results_the_page_says_so(folders: tuple[Path, Path]) -> None:
    assert "No results are committed yet." in generated(folders)
    assert not (folders[1] / "roofline.svg").exists()


def test_the_page_has_the_figures_beside_floors_and_peers(folders: tuple[Path, Path]) -> None:
    write(document("offline", ["W1", "W2", "W4", "W3"]), folders[0])
    page = generated(folders)
    rows = re.findall(r"^\| (W\d) \|.*$", page, re.MULTILINE)
    assert rows == ["W1", "W2", "W3", "W4"]
    assert "| W1 | 1 request, 128 in, 256 out | ms/token | 3.40 | 3.40 to 3.40 | 2.04 |" in page
    assert "4.66, SGLang 0.5.16: 1.37x" in page
    assert "125.2 distinct experts a layer" in page
    assert "| gaps | 300 (30%) |" in page
    assert "isomoe bench offline" in page
    assert "(roofline.svg)" in page


def test_the_newest_result_of_each_workload_counts(folders: tuple[Path, Path]) -> None:
    write(document("offline", ["W1", "W3"]), folders[0] / "one.json")
    newer = document("offline", ["W3"], date="2026-11-26")
    newer["workloads"][0]["value"] = 77_777.0
    write(newer, folders[0] / "another.json")
    page = generated(folders)
    assert "| 77,777 |" in page
    assert "| 68,000 |" not in page
    assert "one.json" in page
    assert "another.json" in page


def test_transformers_is_a_ratio(folders: tuple[Path, Path]) -> None:
    write(document("offline", ["W1"]), folders[0])
    theirs = document("transformers", ["W1"], settings={"output_len": 64})
    theirs["workloads"][0]["value"] = 34.0
    write(theirs, folders[0])
    assert len(list(folders[0].glob("*.json"))) == 2
    assert "isomoe is **10.0 times** as fast" in generated(folders)


def test_kernels_have_a_table(folders: tuple[Path, Path]) -> None:
    one = {
        "name": "route",
        "rows": 64,
        "us": 2.0,
        "twin_us": None,
        "error": 0.0,
        "is_right": True,
        "bytes": 3e6,
        "flops": 0.0,
        "floor_us": 1.0,
        "share": 0.5,
    }
    write(document("offline", ["W1"]), folders[0])
    write(document("kernels", [], kernels=[one]), folders[0])
    page = generated(folders)
    assert "| route | 64 | 2.0 | 1.0 | 50% | 1.50 | 0.0 |  | 0.0e+00 |" in page


def test_custom_workloads_stay_out(folders: tuple[Path, Path]) -> None:
    found = document("offline", ["W1"])
    work = OfflineWorkload.custom(1, 2, 9)
    result = WorkloadResult(work, [SAMPLES["W1"]], work.floor(COUNTS, LIMITS))
    found["workloads"].append(result.to_json(COUNTS, None))
    write(found, folders[0])
    assert "custom" not in generated(folders)


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="the page lacks"):
        docs.replaced("a page", "text")


def test_the_plot_is_svg_with_every_point_below_the_roof(folders: tuple[Path, Path]) -> None:
    write(document("offline", ["W1", "W2", "W3", "W4"]), folders[0])
    generated(folders)
    root = ElementTree.fromstring((folders[1] / "roofline.svg").read_text())
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"W1 60%", "W2 91%", "W3 62%"} <= set(texts)
    assert len(list(root.iter(f"{space}circle"))) == 4
    (roof,) = root.iter(f"{space}polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in roof.attrib["points"].split()]
    for circle in root.iter(f"{space}circle"):
        x, y = float(circle.attrib["cx"]), float(circle.attrib["cy"])
        (x0, y0), (x1, y1) = next(pair for pair in pairwise(corners) if x <= pair[1][0])
        assert y > y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        assert 0 < x < 760
        assert 0 < y < 460


def test_names_in_the_plot_are_escaped() -> None:
    point = Point(name="<a>", intensity=1.0, flops_per_s=1e12, share=0.5)
    ElementTree.fromstring(roofline_svg("a & b", 3e12, 7e14, [point]))


def test_a_folder_gets_a_file_named_by_date_card_and_what(tmp_path: Path) -> None:
    file = write(document("offline", ["W1"]), tmp_path / "new")
    assert file.name == "2026-11-25-a-card-offline.json"
    assert json.loads(file.read_text())["versions"]["commit"] == "abc"
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_file_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--json .*x\.json: not writable"):
        write(document("offline", ["W1"]), tmp_path / "file" / "x.json")
